"""Define the schema of a recipe: how `linearize finetune` trains.

A recipe is one stage, or a list of stages that share out the tokens. `recipes/README.md` lists every key.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from linearize.errors import ConfigError
from linearize.plan import NO_BRANCH
from linearize.settings.schema import Strict

# tokens of a row, and rows of a step
MOST_ROWS = 2**24


class Loss(Strict):
    """The loss that a stage minimises.

    Attributes:
        kind: "kl" is the forward divergence from the teacher to the student; "ce" is next-token loss; "attention" is
            the square error of every layer's attention output, relative to the base's, on the base's own hidden states
            (training/transfer.py).
        ce_share: the share of next-token loss in "kl".
        completion_only: count the assistant's last answer only.
        chunk_tokens: tokens whose logits exist at once.
    """

    kind: Literal["kl", "ce", "attention"] = "kl"
    ce_share: float = Field(default=0.0, ge=0, le=1)
    completion_only: bool = False
    chunk_tokens: int = Field(default=256, ge=1)


# variants that start from a decomposition of the base weights and change these: alone they are no longer the base model
CHANGES_BASE = ("pissa", "olora")


class Lora(Strict):
    """Low-rank adapters (arXiv 2106.09685) on projections of every attention block, or one of PEFT's variants.

    Attributes:
        variant: `vera` (arXiv 2310.11454) trains vectors alone, so it wants a larger rank and rate, and has no alpha;
            `adalora` (arXiv 2303.10512) starts at one and a half times `rank`, which is its average at the end.
        rank: rows of the low-rank factors.
        alpha: scale of the adapters, times the rank.
        dropout: dropout before the adapters.
        targets: names of projections; without any, every projection of the family's attention blocks.
    """

    variant: Literal["lora", "dora", "rslora", "pissa", "olora", "vera", "adalora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = Field(default=None, min_length=1)


class Optimizer(Strict):
    """The optimizer and the schedule of its rates.

    Attributes:
        name: "muon" is for matrices, with AdamW for the rest; "adamw8bit" needs bitsandbytes.
        lr: rate of the adapters.
        mixer_lr: rate of the parameters that a conversion added.
        weight_decay: of the adapters.
        betas: of AdamW.
        warmup_fraction: share of a stage's steps with rising rates.
        schedule: "cosine" falls to `final_fraction` of the rate, "constant" stays.
        final_fraction: see `schedule`.
        clip_norm: largest norm of the gradient; null clips nothing.
    """

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
    """One part of a recipe. Keys that it leaves out have the recipe's values; its name decides the kind of loss.

    Attributes:
        name: "transfer" matches attention outputs, "distill" and "longcontext" the teacher's logits, "finetune" the
            text.
        share: share of the recipe's tokens.
    """

    name: Literal["transfer", "distill", "finetune", "longcontext"]
    share: float = Field(default=1.0, gt=0, le=1)
    seq_len: int = Field(default=1024, ge=2, le=MOST_ROWS)
    batch_size: int = Field(default=1, ge=1, le=MOST_ROWS)
    window_dropout: float = Field(default=0.0, ge=0, lt=1)
    copy_share: float = Field(default=0.0, ge=0, le=1)
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.seq_len * self.batch_size

    def steps(self, tokens: int) -> int:
        """Return the optimizer steps of this stage, given the token budget of the whole recipe."""
        return max(1, math.ceil(self.share * tokens / self.tokens_per_step))


LOSS_OF_STAGE = {"transfer": "attention", "distill": "kl", "longcontext": "kl", "finetune": "ce"}
# the name of the one stage of a recipe without stages
STAGE_OF_LOSS: dict[str, Any] = {"kl": "distill", "ce": "finetune", "attention": "transfer"}
# keys of a stage that it takes from the recipe where it leaves them out; groups of keys are merged
SHARED_KEYS = ("seq_len", "batch_size", "window_dropout", "copy_share")
SHARED_GROUPS = ("loss", "optimizer")


class Recipe(Strict):
    """How `linearize finetune` trains: one stage as the keys here say, or the `stages`, which share out the tokens.

    A key set beside the file, by a flag or `--set`, holds for every stage.

    Attributes:
        description: a line for `linearize list recipes`.
        data: datasets to train on: `sample`, files, or hub ids.
        text_field: the field of a row that holds its text.
        shortest_document: fewest tokens of a document; within the window a shorter one has nothing to learn from.
        tokens: budget of all stages.
        seq_len: tokens of a row.
        batch_size: rows of a step, over all processes.
        gradient_accumulation: parts that each process computes its rows of a step in.
        gradient_checkpointing: compute activations again in the backward pass, for less memory.
        precision: what is computed in; "auto" is bf16 where that is fast.
        quantization: hold the frozen weights in 8 or 4 bits while adapters train (QLoRA, arXiv 2305.14314). The
            checkpoint that is written has its own, whole weights with the adapters.
        checkpoint_every: steps between saved states.
        seed: of the order of documents, of copies, window dropout and adapters.
        window_dropout: probability that a linear head's window is, for one step, a quarter as long (none at all in the
            mix `sum`), so that the recurrent branch has to do more.
        copy_share: share of rows that end with a copy of a span from outside the window.
        loss, lora, optimizer: groups of keys.
        stages: the stages in their order; without any, the keys here are the one stage.
    """

    description: str = ""
    data: list[str] = Field(default=["sample"], min_length=1)
    text_field: str = "text"
    shortest_document: int = Field(default=0, ge=0)
    tokens: int = Field(default=300_000, ge=1)
    seq_len: int = Field(default=1024, ge=2, le=MOST_ROWS)
    batch_size: int = Field(default=1, ge=1, le=MOST_ROWS)
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
    def _tokens_with_suffix(cls, value: Any) -> Any:
        """Read numbers such as 300K."""
        return parse_tokens(value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _complete_stages(cls, data: Any) -> Any:
        """Give every stage the recipe's values for what it leaves out."""
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
            return data
        return {**data, "stages": [_complete_stage(stage, data) for stage in data["stages"]]}

    @model_validator(mode="after")
    def _check_settings_together(self) -> "Recipe":
        """Refuse values that do not fit one another."""
        total = sum(stage.share for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            raise ValueError(f"stages: shares add up to {total:g}, allowed is 1")
        if self.quantization and self.lora.variant in CHANGES_BASE:
            raise ValueError(
                f"quantization: got {self.quantization}, but {self.lora.variant} starts from whole weights"
            )
        later_stages = self.resolved_stages()[1:]
        if any(stage.loss.kind == "attention" for stage in later_stages):
            raise ValueError("stages: transfer matches the base's own hidden states, so allowed is only as the first")
        return self

    def resolved_stages(self) -> list[Stage]:
        """Return the stages in their order: those of the recipe, or the one that its keys describe."""
        if self.stages:
            return self.stages
        keys = self.model_dump(include={*SHARED_KEYS, *SHARED_GROUPS})
        return [Stage.model_validate({"name": STAGE_OF_LOSS[self.loss.kind], **keys})]

    def check_leaves_window(self, mix: str, window: int, sinks: int) -> None:
        """Refuse rows that end before the recurrent branch has anything to add.

        Args:
            mix, window, sinks: settings of the conversion that is trained.

        Raises:
            ConfigError: the rows of a stage are too short.
        """
        shortest = min(stage.seq_len for stage in self.resolved_stages())
        if mix not in ("sum", NO_BRANCH) and shortest <= window + sinks:
            raise ConfigError(
                f"seq_len: got {shortest}, which never leaves the window of {window} keys and {sinks} sinks, so the "
                "recurrent branch would not train; use more"
            )


def _complete_stage(stage: Any, recipe: dict[str, Any]) -> Any:
    """Return a stage as a file gives it, with the recipe's values for what it leaves out."""
    if not isinstance(stage, dict):
        return stage  # for the schema to refuse
    name = str(stage.get("name"))
    kind = {"kind": LOSS_OF_STAGE[name]} if name in LOSS_OF_STAGE else {}
    first = {"completion_only": True} if name == "finetune" else {}
    shared = {key: recipe[key] for key in SHARED_KEYS if key in recipe}
    return {
        **shared,
        **stage,
        "loss": _merge_groups(first, recipe.get("loss", {}), kind, stage.get("loss", {})),
        "optimizer": _merge_groups(recipe.get("optimizer", {}), stage.get("optimizer", {})),
    }


def _merge_groups(*groups: Any) -> Any:
    """Merge groups of keys, later ones winning. Return the last value that is no group, for the schema to refuse."""
    invalid = [group for group in groups if not isinstance(group, dict)]
    if invalid:
        return invalid[-1]
    return {key: value for group in groups for key, value in group.items()}


def parse_tokens(text: str) -> int | str:
    """Read a number of tokens as people write it: 300K, 1.5M, 20_000. Return any other text unchanged."""
    units = {"K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
    suffix = text[-1:].upper()
    number, unit = (text[:-1], units[suffix]) if suffix in units else (text, 1)
    try:
        return round(float(number.replace("_", "")) * unit)
    except (ValueError, OverflowError):
        return text
