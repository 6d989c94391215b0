"""Configs (choices for one model) and recipes (a training procedure): schema, loading, precedence.

A key is set by, later ones winning: the schema's default, the named or given YAML file, a command-line flag, `--set`.
Unknown keys and wrong values are collected at every depth and reported together.
"""

import importlib.resources
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from linearize.errors import ConfigError, nearest
from linearize.mixers.registry import MIXERS
from linearize.modeling.plan import MIX_OPTIONS

POSITIVE_OPTIONS = {"gate_logit_normalizer"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConversionConfig(Strict):
    """What `linearize convert` decides about a model."""

    description: str = ""
    mixer: str = "gla"
    mixer_options: dict[str, float | int | bool | str] = {}
    window: int = Field(default=256, ge=1)
    sinks: int = Field(default=4, ge=0)
    mix: Literal["sum", "outside"] = "outside"
    mix_options: dict[str, float | int | bool | str] = {}
    keep_softmax: str = "none"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @field_validator("keep_softmax", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("mixer")
    @classmethod
    def _known_mixer(cls, name: str) -> str:
        if name not in MIXERS:
            raise ValueError(f"allowed are {', '.join(MIXERS)}{nearest(name, MIXERS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> "ConversionConfig":
        entry = MIXERS[self.mixer]
        problems = []
        if self.mix not in entry.mixes:
            problems.append(f"mix: {self.mixer} can be mixed by {', '.join(entry.mixes)}, not by {self.mix}")
        problems += _check_options("mixer_options", self.mixer_options, entry.options)
        problems += _check_options("mix_options", self.mix_options, MIX_OPTIONS[self.mix])
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _check_options(group: str, given: dict, allowed: dict) -> list[str]:
    """Problems of settings whose names, types and defaults are listed in `allowed`."""
    problems = []
    for key, value in given.items():
        if key not in allowed:
            problems.append(_unknown(f"{group}.{key}", key, allowed))
        elif isinstance(allowed[key], bool) != isinstance(value, bool):
            problems.append(
                f"{group}.{key}: got {value!r}, allowed is {'true or false' if isinstance(allowed[key], bool) else 'a number'}"
            )
        elif isinstance(allowed[key], float) and not (isinstance(value, int | float) and math.isfinite(value)):
            problems.append(f"{group}.{key}: got {value!r}, allowed is a finite number")
        elif key in POSITIVE_OPTIONS and value <= 0:
            problems.append(f"{group}.{key}: got {value!r}, allowed is a number above 0")
    return problems


class Loss(Strict):
    """What is minimised. `kl` is the forward divergence from the teacher to the student, `ce` next-token loss."""

    kind: Literal["kl", "ce"] = "kl"
    completion_only: bool = False
    chunk_tokens: int = Field(default=256, ge=1)


class Lora(Strict):
    """Low-rank adapters (arXiv 2106.09685) on the named projections of every attention block."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class Optimizer(Strict):
    """AdamW and its schedule. `mixer_lr` is the rate of the parameters a conversion added."""

    lr: float = Field(default=5e-4, gt=0)
    mixer_lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    clip_norm: float | None = Field(default=1.0, gt=0)


class Recipe(Strict):
    """What `linearize finetune` does."""

    description: str = ""
    data: list[str] = Field(default=["sample"], min_length=1)
    text_field: str = "text"
    tokens: int = Field(default=300_000, ge=1)
    seq_len: int = Field(default=1024, ge=2)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_every: int = Field(default=25, ge=1)
    seed: int = Field(default=0, ge=0)
    loss: Loss = Loss()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()


def packaged(kind: Literal["recipes", "configs"]) -> dict[str, Path]:
    """The YAML files that ship with the package, by name."""
    folder = Path(str(importlib.resources.files("linearize"))) / kind
    if not folder.is_dir():  # a source checkout keeps them beside the package
        folder = Path(__file__).resolve().parent.parent / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(
    name: str | None, flags: dict[str, Any] | None = None, sets: list[str] | None = None
) -> ConversionConfig:
    """The config `name` (or a YAML file, or the defaults) with flags and `--set` applied."""
    return _load(ConversionConfig, "configs", name, flags, sets)


def load_recipe(name: str, flags: dict[str, Any] | None = None, sets: list[str] | None = None) -> Recipe:
    """The recipe `name` (or a YAML file) with flags and `--set` applied."""
    return _load(Recipe, "recipes", name, flags, sets)


def _load(schema: type, kind: str, name: str | None, flags: dict | None, sets: list[str] | None):
    data: dict[str, Any] = {}
    origin = "command line"
    if name is not None:
        path = _find(kind, name)
        origin = str(path)
        data = _read_yaml(path)
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(data, key, value)
    for item in sets or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: got '{item}', allowed is key=value, for example --set window=128")
        _assign(data, key, _scalar(text))
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item, schema).splitlines()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _find(kind: str, name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"--{kind[:-1]}: no file '{name}'")
        return Path(name)
    known = packaged(kind)
    if name not in known:
        raise ConfigError(
            f"--{kind[:-1]}: got '{name}', allowed are {', '.join(known)} or a .yaml file{nearest(name, known)}"
        )
    return known[name]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a {type(data).__name__} at the top, allowed is a mapping of keys")
    return data


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text) if text else ""
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            return value
    return value


def _assign(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {dotted}: '{parent}' is a value, not a group of keys")
    data[last] = value


def _unknown(dotted: str, key: str, allowed) -> str:
    return f"{dotted}: unknown key, allowed are {', '.join(allowed) or 'none'}{nearest(key, allowed)}"


def _explain(item: dict, schema: type[BaseModel], prefix: str = "") -> str:
    """One line for one pydantic error: the key, what was got, what is allowed, the nearest name."""
    location = [str(part) for part in item["loc"]]
    dotted = prefix + ".".join(location)
    if item["type"] == "extra_forbidden":
        group = schema
        for part in location[:-1]:
            group = group.model_fields[part].annotation
        return _unknown(dotted, location[-1], group.model_fields)
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    shown = repr(item["input"])
    return f"{dotted}: got {shown if len(shown) < 80 else shown[:77] + '...'}; {message[0].lower() + message[1:]}"
