"""Configs (choices for one model) and recipes (a training procedure): schema, loading, precedence.

A key is set by, later ones winning: the schema's default, the named or given YAML file, a command-line flag, `--set`.
Unknown keys and wrong values are collected at every depth and reported together.
"""

import importlib.resources
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from linearize.errors import ConfigError, nearest, one_line
from linearize.mixers.registry import CHOICES
from linearize.modeling.plan import MIX_OPTIONS, NO_BRANCH

# tokens that a window can be asked for
LONGEST = 2**31 - 1
# more than any model has
MOST_LAYERS = 100_000
ABOVE_ZERO = {"gate_logit_normalizer"}
Options = dict[str, float | int | bool | str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScoringSettings(Strict):
    """How `keep_softmax: recall:SHARE`, `text:SHARE` and `both:SHARE` score heads (linearize/scoring.py).

    Recall is scored at `distances`, in tokens, with `rows` rows of copies at each and `fact_rows` rows of facts at the longest;
    the facts stand in text of the dataset `text`, and long text is scored on `text_rows` rows of it.
    """

    method: Literal["gradient", "swap", "lookup", "elimination"] = "gradient"
    distances: list[int] = Field(default=[512, 1024], min_length=1)
    rows: int = Field(default=2, ge=1)
    fact_rows: int = Field(default=6, ge=0)
    text: str = "sample"
    text_rows: int = Field(default=1, ge=1)


class CalibrationSettings(Strict):
    """How added parameters get their first values from the base model (linearize/calibrate.py).

    `auto` calibrates where the base can be run: on a GPU that holds it, on a CPU up to 1 GiB of weights.
    """

    when: Literal["auto", "always", "never"] = "auto"
    text: str = "sample"
    rows: int = Field(default=3, ge=2)


class LayerSettings(Strict):
    """What can differ from layer to layer; what is not said is as in the rest of the config."""

    mixer: str | None = None
    mixer_options: Options | None = None
    gate: Literal["key", "learned"] | None = None
    window: int | None = Field(default=None, ge=1, le=LONGEST)
    sinks: int | None = Field(default=None, ge=0)
    softmax_window: int | None = Field(default=None, ge=1, le=LONGEST)
    mix: Literal["sum", "outside", "joint", "none"] | None = None
    mix_options: Options | None = None


class ConversionConfig(Strict):
    """What `linearize convert` decides about a model."""

    description: str = ""
    mixer: str = "vq"
    mixer_options: Options = {}
    gate: Literal["key", "learned"] = "key"
    window: int = Field(default=512, ge=1, le=LONGEST)
    sinks: int = Field(default=4, ge=0)
    mix: Literal["sum", "outside", "joint", "none"] = "outside"
    mix_options: Options = {}
    # layers that differ: "0-3,7" -> settings
    layers: dict[str, LayerSettings] = {}
    # which layers are converted at all: "full" (those without a sliding window of their own), "all" or "0-3,7"
    convert_layers: str = "full"
    keep_softmax: str = "auto"
    # tokens that the heads so kept see, beside the sinks; none said: all
    softmax_window: int | None = Field(default=None, ge=1, le=LONGEST)
    scoring: ScoringSettings = ScoringSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _mixer_and_mix(cls, data: Any) -> Any:
        """Of the two, what is not said follows from the other."""
        if not isinstance(data, dict):
            return data
        mix = data.get("mix")
        mixer = data.get("mixer") or (
            mix if mix == NO_BRANCH else "vq" if mix in (None, *CHOICES["vq"].mixes[:1]) else "gla"
        )
        return {**data, "mixer": mixer, "mix": mix or _default_mix(mixer)}

    @field_validator("keep_softmax", "convert_layers", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _options_fit(self) -> "ConversionConfig":
        problems = _problems(self.layer_settings({}), "")
        if self.convert_layers not in ("full", "all"):
            try:
                layer_numbers(self.convert_layers)
            except ValueError as error:
                problems.append(f"convert_layers: {error}; or full, or all")
        claimed: dict[int, str] = {}
        for spec, changes in self.layers.items():
            problems += _problems(self.layer_settings(changes.model_dump(exclude_none=True)), f"layers.{spec}.")
            try:
                for layer in layer_numbers(spec):
                    if layer in claimed:
                        problems.append(f"layers.{spec}: layer {layer} is already in '{claimed[layer]}'")
                    claimed[layer] = spec
            except ValueError as error:
                problems.append(f"layers.{spec}: {error}")
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def layer_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The settings of one layer: these, with `changes` on top. Another mixer or mix starts from its own defaults."""
        names = ("mixer", "mixer_options", "gate", "window", "sinks", "mix", "mix_options", "softmax_window")
        settings = {name: getattr(self, name) for name in names}
        for kind in ("mixer", "mix"):
            if changes.get(kind, settings[kind]) != settings[kind]:
                settings[f"{kind}_options"] = {}
        if (
            "mix" not in changes
            and changes.get("mixer") in CHOICES
            and settings["mix"] not in CHOICES[changes["mixer"]].mixes
        ):
            settings["mix"], settings["mix_options"] = _default_mix(changes["mixer"]), {}
        for name, value in changes.items():
            settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
        return settings


def _default_mix(mixer: Any) -> str:
    return CHOICES[mixer].mixes[0] if isinstance(mixer, str) and mixer in CHOICES else "outside"


def layer_numbers(spec: str) -> list[int]:
    """The layers that a key of `layers` names: "0-3,7" -> [0, 1, 2, 3, 7]."""
    numbers: list[int] = []
    for part in spec.split(","):
        first, dash, last = (text.strip() for text in part.partition("-"))
        fits = first.isdecimal() and (not dash or (last.isdecimal() and int(first) <= int(last) < MOST_LAYERS))
        if not fits:
            raise ValueError(f"got '{spec}', allowed are layers and ranges, for example 0-3,7")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _problems(settings: dict[str, Any], prefix: str) -> list[str]:
    """What is wrong with one layer's settings, beyond their types."""
    name, mix = settings["mixer"], settings["mix"]
    if name not in CHOICES:
        return [f"{prefix}mixer: got '{name}'; allowed are {', '.join(CHOICES)}{nearest(name, CHOICES)}"]
    entry = CHOICES[name]
    problems = _check_options(f"{prefix}mixer_options", settings["mixer_options"], entry.options)
    problems += _check_options(f"{prefix}mix_options", settings["mix_options"], MIX_OPTIONS[mix])
    if mix not in entry.mixes:
        problems.append(f"{prefix}mix: got '{mix}', allowed with {name} is {' or '.join(entry.mixes)}")
    kept = settings["softmax_window"]
    if kept is not None and kept < settings["window"]:
        problems.append(
            f"{prefix}softmax_window: got {kept}, allowed is at least the other heads' window, {settings['window']}"
        )
    if problems:
        return problems
    if mix == "joint" and not entry.shares_normaliser(settings["mixer_options"]):
        problems.append(
            f"{prefix}mix: {name} can give tokens negative weights or has a norm of its own, so it cannot share a "
            "normaliser (joint); allowed are sum, outside"
        )
    if settings["gate"] == "learned" and not entry.has_gates(settings["mixer_options"]):
        problems.append(f"{prefix}gate: {name} has no gate to learn; allowed is key")
    return problems


def _check_options(group: str, given: dict, allowed: dict) -> list[str]:
    """Problems of settings whose names, types and defaults are listed in `allowed`."""
    problems = []
    for key, value in given.items():
        dotted, default = f"{group}.{key}", allowed.get(key)
        if key not in allowed:
            problems.append(_unknown(dotted, key, allowed))
        elif isinstance(default, tuple):
            if value not in default:
                problems.append(
                    f"{dotted}: got {value!r}, allowed are {', '.join(default)}{nearest(str(value), default)}"
                )
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                problems.append(f"{dotted}: got {value!r}, allowed is true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(f"{dotted}: got {value!r}, allowed is a finite number")
        elif isinstance(default, int) and (value != int(value) or value < 1):
            problems.append(f"{dotted}: got {value!r}, allowed is a whole number above 0")
        elif key in ABOVE_ZERO and value <= 0:
            problems.append(f"{dotted}: got {value!r}, allowed is a number above 0")
        elif key == "lower_bound" and not 0 <= value < 1:
            problems.append(f"{dotted}: got {value!r}, allowed is a number from 0 to below 1")
    memories, top = given.get("memories", allowed.get("memories")), given.get("top", allowed.get("top"))
    if not problems and top is not None and top > memories:
        problems.append(f"{group}.top: got {top}, allowed is at most memories, {memories}")
    return problems


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


def packaged(kind: Literal["recipes", "configs"]) -> dict[str, Path]:
    """The YAML files that ship with the package, by name."""
    folder = Path(str(importlib.resources.files("linearize"))) / kind
    if not folder.is_dir():  # a source checkout keeps them beside the package
        folder = Path(__file__).resolve().parent.parent / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


COMMAND_LINE = "command line"


def load_config(
    name: str | None,
    flags: dict[str, Any] | None = None,
    sets: list[str] | None = None,
    given_in: str = COMMAND_LINE,
) -> ConversionConfig:
    """The config `name` (or a YAML file, or the defaults) with flags and `--set` applied.

    Args:
        given_in: where name, flags and sets stand, for the errors.

    Raises:
        ConfigError: one line for every wrong key and value.
    """
    return _load(ConversionConfig, "configs", name, flags, sets, given_in)


def load_recipe(
    name: str,
    flags: dict[str, Any] | None = None,
    sets: list[str] | None = None,
    given_in: str = COMMAND_LINE,
) -> Recipe:
    """The recipe `name` (or a YAML file) with flags and `--set` applied; as `load_config`."""
    return _load(Recipe, "recipes", name, flags, sets, given_in)


def _load(schema: type, kind: str, name: str | None, flags: dict | None, sets: list[str] | None, given_in: str):
    data: dict[str, Any] = {}
    origin, given = given_in, []
    if name is not None:
        path = _find(kind, name)
        origin = str(path)
        data = read_yaml(path)
    # stages come last: what they say themselves stands
    for key, value in sorted((flags or {}).items(), key=lambda item: item[0] == "stages"):
        if value is not None:
            if value != data.get(key):
                data.pop(f"{key}_options", None)  # another mixer or mix has other options
            _give(data, key, value)
            given.append(key)
    for item in sets or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: got '{item}', allowed is key=value, for example --set window=128")
        try:
            _give(data, key, _scalar(text))
            given.append(key)
        except yaml.YAMLError:
            raise ConfigError(f"--set: got '{item}', whose value is not valid YAML") from None
    lines: dict[str, None] = {}
    while True:
        try:
            settings = schema.model_validate(data)
            break
        except ValidationError as error:
            found = error.errors()
            lines |= dict.fromkeys(line for item in found for line in explain(item, schema).splitlines())
            # what is checked last is only checked where all before it holds, so the wrong keys go and it is looked at again
            if not any([_removed(data, item["loc"]) for item in found]):
                break
    if lines:
        of_these = tuple(f"{key}{end}" for key in given for end in (":", "."))
        places = [given_in if line.startswith(of_these) else origin for line in lines]
        raise ConfigError("\n".join(f"{place}: {line}" for place, line in zip(places, lines)))
    return settings


def _removed(data: Any, location: Sequence) -> bool:
    """Takes the value at `location` out of nested dicts and lists; whether there was one."""
    *parents, last = location or [None]
    for key in parents:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return False
    if isinstance(data, dict) and last in data:
        del data[last]
        return True
    return False


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


class _Loader(yaml.SafeLoader):
    """YAML, in which 18:2 is no number of base 60, and a key that stands twice, of which YAML keeps the second, a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, (at, _) in zip(keys, node.value):
            if keys.count(key) > 1 and key != "<<":
                raise yaml.YAMLError(f"key '{key}' stands twice{at.start_mark}")
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "int": r"^[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises: ConfigError: it is none, or a key stands twice."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a {type(data).__name__} at the top, allowed is a mapping of keys")
    return data


def _scalar(text: str) -> Any:
    return yaml.load(text, _Loader) if text else ""


def _give(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a key of the file; a mapping lies over what is there, and what a recipe's stages say otherwise goes."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _give(data, f"{dotted}.{key}", item)
        return
    _assign(data, dotted, value)
    stages = data.get("stages")
    if isinstance(stages, list) and stages and dotted == "loss.kind":
        raise ConfigError("loss.kind: in a recipe of stages their names decide it; set the stages themselves")
    for stage in stages if isinstance(stages, list) else []:
        _removed(stage, dotted.split("."))


def _assign(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {dotted}: '{parent}' is a value, not a group of keys")
    data[last] = value


def _unknown(dotted: str, key: str, allowed) -> str:
    return f"{dotted}: unknown key, allowed are {', '.join(allowed) or 'none'}{nearest(key, allowed)}"


def explain(item: dict, schema: type[BaseModel]) -> str:
    """One line for one pydantic error: the key, what was got, what is allowed, the nearest name."""
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        group = schema
        for part in item["loc"][:-1]:
            if isinstance(part, int):
                continue  # the group is what the list holds
            group = LayerSettings if group is dict else group.model_fields[part].annotation
            # of a list or of something that may be absent it is what stands inside
            group = get_args(group)[0] if get_origin(group) in (list, UnionType) else get_origin(group) or group
        return _unknown(dotted, location[-1], group.model_fields)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{dotted}: missing, and has no default"
    if not location:
        return message
    shown = repr(item["input"])
    return f"{dotted}: got {shown if len(shown) < 80 else shown[:77] + '...'}; {message[0].lower() + message[1:]}"
