"""Configs (choices for one model) and recipes (a training procedure): schema, loading, precedence.

A key is set by, later ones winning: the schema's default, the named or given YAML file, a command-line flag, `--set`.
Unknown keys and wrong values are collected at every depth and reported together.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from linearize.settings.yaml_file import Strict


class Loss(Strict):
    """What is minimised. `kl` is the forward divergence from the teacher to the student, of which `ce_share` can be
    next-token loss; `ce` is next-token loss alone; `attention` the square error of every layer's attention output, relative
    to the base's, on the base's own hidden states (training/transfer.py)."""

    kind: Literal["kl", "ce", "attention"] = "kl"
    ce_share: float = Field(default=0.0, ge=0, le=1)
    completion_only: bool = False
    chunk_tokens: int = Field(default=256, ge=1)


# variants that take their start out of the base weights, so that these alone are no longer the base model
OWN_START = ("pissa", "olora")


class Lora(Strict):
    """Low-rank adapters (arXiv 2106.09685) on projections of every attention block, or one of PEFT's variants; `vera`
    (arXiv 2310.11454) trains vectors alone, so that it wants a larger rank and rate, and has no alpha; `adalora` (arXiv
    2303.10512) starts at one and a half times `rank`, which is what the average is at the end."""

    variant: Literal["lora", "dora", "rslora", "pissa", "olora", "vera", "adalora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # none named: every projection of the family's attention blocks
    targets: list[str] | None = Field(default=None, min_length=1)


class Optimizer(Strict):
    """Optimizer and schedule. `muon` is for matrices, with AdamW for the rest. `mixer_lr` is the rate of the parameters a
    conversion added."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    mixer_lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    clip_norm: float | None = Field(default=1.0, gt=0)


class Stage(Strict):
    """One part of a recipe. What it leaves out is as in the recipe around it; its name decides the kind of loss."""

    name: Literal["transfer", "distill", "finetune", "longcontext"]
    share: float = Field(default=1.0, gt=0, le=1)
    seq_len: int = Field(default=1024, ge=2)
    batch_size: int = Field(default=1, ge=1)
    window_dropout: float = Field(default=0.0, ge=0, lt=1)
    copy_share: float = Field(default=0.0, ge=0, le=1)
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()

    def steps(self, tokens: int) -> int:
        """Optimizer steps of this stage, of a budget of `tokens` for the whole recipe."""
        return max(1, math.ceil(self.share * tokens / (self.seq_len * self.batch_size)))


STAGE_LOSSES = {"transfer": "attention", "distill": "kl", "longcontext": "kl", "finetune": "ce"}


class Recipe(Strict):
    """What `linearize finetune` does: one stage as the keys here say, or the `stages`, which share out the tokens. A key given
    beside the file, as `--lr` or `--set`, holds for every stage.

    `window_dropout` is the probability that a linear head's window is, for one step, a quarter as long (none at all in the
    mix `sum`), so that the recurrent branch has to do more. `copy_share` of the rows end with a copy of a span from outside
    the window. Documents of fewer tokens than `shortest_document` are left out: within the window there is nothing to learn.
    `quantization` holds the frozen weights in 8 or 4 bits while adapters train (QLoRA, arXiv 2305.14314); what is written
    are the checkpoint's own weights with the adapters.
    """

    description: str = ""
    data: list[str] = Field(default=["sample"], min_length=1)
    text_field: str = "text"
    shortest_document: int = Field(default=0, ge=0)
    tokens: int = Field(default=300_000, ge=1)
    seq_len: int = Field(default=1024, ge=2)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    quantization: Literal["int8", "nf4"] | None = None
    checkpoint_every: int = Field(default=25, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    window_dropout: float = Field(default=0.0, ge=0, lt=1)
    copy_share: float = Field(default=0.0, ge=0, le=1)
    loss: Loss = Loss()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    stages: list[Stage] = []

    @field_validator("tokens", mode="before")
    @classmethod
    def _suffixed(cls, value: Any) -> Any:
        return tokens_of(value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _fill_stages(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
            return data
        shared = ("seq_len", "batch_size", "window_dropout", "copy_share")
        filled = []
        for stage in data["stages"]:
            if isinstance(stage, dict):
                name = str(stage.get("name"))
                kind = {"kind": STAGE_LOSSES[name]} if name in STAGE_LOSSES else {}
                first = {"completion_only": True} if name == "finetune" else {}
                loss = _over(first, data.get("loss", {}), kind, stage.get("loss", {}))
                optimizer = _over(data.get("optimizer", {}), stage.get("optimizer", {}))
                around = {key: data[key] for key in shared if key in data}
                stage = {**around, **stage, "loss": loss, "optimizer": optimizer}
            filled.append(stage)
        return {**data, "stages": filled}

    @model_validator(mode="after")
    def _stages_fit(self) -> "Recipe":
        if self.stages and abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise ValueError(f"stages: shares add up to {sum(s.share for s in self.stages):g}, allowed is 1")
        if self.quantization and self.lora.variant in OWN_START:
            raise ValueError(
                f"quantization: got {self.quantization}, but {self.lora.variant} starts from whole weights"
            )
        seen = [stage.loss.kind for stage in self.plan()]
        if "attention" in seen[1:]:
            raise ValueError("stages: transfer matches the base's own hidden states, so allowed is only as the first")
        return self

    def plan(self) -> list[Stage]:
        """The stages to go through."""
        if self.stages:
            return self.stages
        name = {"kl": "distill", "ce": "finetune", "attention": "transfer"}[self.loss.kind]
        around = self.model_dump(include={"seq_len", "batch_size", "window_dropout", "copy_share", "loss", "optimizer"})
        return [Stage.model_validate({"name": name, **around})]


def _over(*groups: Any) -> Any:
    """Groups of keys laid over one another; what is no group is left for the schema to refuse."""
    wrong = [group for group in groups if not isinstance(group, dict)]
    return wrong[-1] if wrong else {key: value for group in groups for key, value in group.items()}


def tokens_of(text: str) -> int | str:
    """A number of tokens as people write it: 300K, 1.5M, 20_000. What is none of them comes back unchanged."""
    units = {"K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return round(float(number.replace("_", "")) * unit)
    except (ValueError, OverflowError):
        return text
