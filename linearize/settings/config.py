"""Define the schema of a conversion config: every choice that `linearize convert` makes about a model."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from linearize.errors import nearest
from linearize.mixers.registry import CHOICES
from linearize.plan import MIX_OPTIONS, NO_BRANCH
from linearize.settings.yaml_file import Strict

# tokens that a window can be asked for
LONGEST = 2**31 - 1


# more than any model has
MOST_LAYERS = 100_000


ABOVE_ZERO = {"gate_logit_normalizer"}


Options = dict[str, float | int | bool | str]


class ScoringSettings(Strict):
    """How `keep_softmax: recall:SHARE`, `text:SHARE` and `both:SHARE` score heads (linearize/conversion/scoring.py).

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
    """How added parameters get their first values from the base model (linearize/conversion/calibrate.py).

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
            problems.append(unknown_key(dotted, key, allowed))
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


def unknown_key(dotted: str, key: str, allowed) -> str:
    return f"{dotted}: unknown key, allowed are {', '.join(allowed) or 'none'}{nearest(key, allowed)}"
