"""Define the schema of a conversion config: every choice that `linearize convert` makes about a model.

A config names a mixer and how it meets the window, and which heads keep softmax. Single layers can differ.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from linearize.errors import nearest
from linearize.mixers.entry import Option
from linearize.mixers.registry import CHOICES
from linearize.plan import MIX_OPTIONS, NO_BRANCH
from linearize.settings.schema import Strict, unknown_key

# tokens: no window is longer than a 32-bit index
LONGEST_WINDOW = 2**31 - 1
# more than any model has, so that a mistyped range does not fill the memory
MOST_LAYERS = 100_000

# seconds of a unit of time
SECONDS = {"s": 1, "m": 60, "h": 3600}

Options = dict[str, float | int | bool | str]
Mix = Literal["sum", "outside", "joint", "none"]
Gate = Literal["key", "learned"]


class ScoringSettings(Strict):
    """How `keep_softmax: recall:SHARE`, `text:SHARE` and `both:SHARE` score heads (linearize/conversion/scoring.py).

    Attributes:
        method: how a head's score is computed.
        distances: tokens from a span or a fact to its copy or question; null for 2.5 and 6 windows, as positions allow.
        rows: rows of look-ups; each asks for facts, a passage and random tokens from every distance.
        text: the dataset whose text the rows have, and of the long text.
        text_rows: rows of long text that are scored.
    """

    method: Literal["gradient", "swap", "lookup", "elimination"] = "gradient"
    distances: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    rows: int = Field(default=1, ge=1)
    text: str = "sample"
    text_rows: int = Field(default=1, ge=1)


class CalibrationSettings(Strict):
    """How added parameters get their first values from the base model (linearize/conversion/calibrate.py).

    Attributes:
        when: "auto" calibrates if there is text for it, "always" insists, "never" leaves the first values.
        text: the dataset to calibrate on.
        rows: rows of its text.
    """

    when: Literal["auto", "always", "never"] = "auto"
    text: str = "sample"
    rows: int = Field(default=3, ge=2)


class QualitySettings(Strict):
    """How much of the base `keep_softmax: auto` has to hold, on rows that no head is chosen on (conversion/quality.py).

    Attributes:
        target: share of the base's copies, facts and quotes from beyond the window, in hits and in nats.
        divergence: largest KL from the base on text beyond the window, in nats a token.
        cache_budget: largest cache beside the base's at 32K tokens, as a share; null for none.
        rows: rows of text to measure on.
        budget: seconds that the conversion may take, as a number or as 40s, 10m, 2h; null for any.
    """

    target: float = Field(default=0.97, gt=0, le=1)
    divergence: float = Field(default=0.02, gt=0)
    cache_budget: float | None = Field(default=None, gt=0, le=1)
    rows: int = Field(default=1, ge=1)
    budget: float | None = Field(default=None, gt=0)

    @field_validator("budget", mode="before")
    @classmethod
    def _time(cls, value: Any) -> Any:
        """Take 10m for 600 seconds."""
        text = str(value).strip()
        if isinstance(value, str) and text[-1:] in SECONDS:
            return float(text[:-1]) * SECONDS[text[-1]]
        return float(text) if isinstance(value, str) else value

    @field_validator("target", "cache_budget", mode="before")
    @classmethod
    def _percentage(cls, value: Any) -> Any:
        """Take a percentage for a fraction: 15% and 0.15 are the same."""
        if isinstance(value, str) and value.strip().endswith("%"):
            return float(value.strip().removesuffix("%")) / 100
        return float(value) if isinstance(value, str) else value


class LayerSettings(Strict):
    """Settings of single layers, laid over those of the config; a key without a value changes nothing."""

    mixer: str | None = None
    mixer_options: Options | None = None
    gate: Gate | None = None
    window: int | None = Field(default=None, ge=1, le=LONGEST_WINDOW)
    sinks: int | None = Field(default=None, ge=0, le=LONGEST_WINDOW)
    softmax_window: int | None = Field(default=None, ge=1, le=LONGEST_WINDOW)
    mix: Mix | None = None
    mix_options: Options | None = None


class ConversionConfig(Strict):
    """Every choice that `linearize convert` makes about a model.

    Attributes:
        description: a line for `linearize list configs`.
        mixer: the recurrent structure of linear heads (`linearize list mixers`), or "none".
        mixer_options: its options.
        gate: where gate logits come from: the key projection, or that and a learned correction.
        window: keys that a linear head sees through softmax, the query's own included.
        sinks: first tokens of a document that stay visible after they left the window.
        mix: how window and recurrent branch become one output.
        mix_options: options of the mix.
        layers: settings of layers that differ, by layer numbers: "0-3,7".
        convert_layers: layers to convert: "full" (those without a sliding window of their own), "all" or "0-3,7".
        keep_softmax: heads that keep softmax: "auto", "none", "all", "every:N", a score and a share, layers, or
            layer:head pairs.
        softmax_window: keys that these heads see beside the sinks; without it, all.
        scoring: how heads are scored, where `keep_softmax` asks for a score.
        calibration: how added parameters get their first values.
        quality: how much of the base has to be held, where `keep_softmax` is "auto".
        dtype: precision that the weights of a GGUF file are read in.
    """

    description: str = ""
    mixer: str = "vq"
    mixer_options: Options = {}
    gate: Gate = "key"
    window: int = Field(default=512, ge=1, le=LONGEST_WINDOW)
    sinks: int = Field(default=4, ge=0, le=LONGEST_WINDOW)
    mix: Mix = "outside"
    mix_options: Options = {}
    layers: dict[str, LayerSettings] = {}
    convert_layers: str = "full"
    keep_softmax: str = "auto"
    softmax_window: int | None = Field(default=None, ge=1, le=LONGEST_WINDOW)
    scoring: ScoringSettings = ScoringSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    quality: QualitySettings = QualitySettings()
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _fill_mixer_and_mix(cls, data: Any) -> Any:
        """Derive a mixer that is not given from the mix, then a mix that is not given from the mixer."""
        if not isinstance(data, dict):
            return data
        mixer = data.get("mixer") or _default_mixer(data.get("mix"))
        mix = data.get("mix") or _default_mix(mixer)
        return {**data, "mixer": mixer, "mix": mix}

    @field_validator("keep_softmax", "convert_layers", mode="before")
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        """Take a single layer, which YAML reads as a number, as text."""
        return str(value) if isinstance(value, int) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _keys_as_text(cls, value: Any) -> Any:
        """Take single layers as keys, which YAML reads as numbers, as text."""
        return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_settings_together(self) -> "ConversionConfig":
        """Refuse values that do not fit one another, in the config and in each group of layers."""
        problems = _layer_problems(self.layer_settings({}), "")
        if self.convert_layers not in ("full", "all"):
            try:
                layer_numbers(self.convert_layers)
            except ValueError as error:
                problems.append(f"convert_layers: {error}; or full, or all")
        for spec, changes in self.layers.items():
            problems += _layer_problems(self.layer_settings(changes.model_dump(exclude_none=True)), f"layers.{spec}.")
        problems += _overlapping_layers(self.layers)
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def layer_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of one layer: those of the config with `changes` laid over them.

        Another mixer or mix starts from default options. Another mixer that cannot use the config's mix gets its own.
        """
        names = ("mixer", "mixer_options", "gate", "window", "sinks", "mix", "mix_options", "softmax_window")
        settings = {name: getattr(self, name) for name in names}
        for kind in ("mixer", "mix"):
            if changes.get(kind, settings[kind]) != settings[kind]:
                settings[f"{kind}_options"] = {}
        mixer = CHOICES.get(changes.get("mixer", ""))
        if mixer is not None and "mix" not in changes and settings["mix"] not in mixer.mixes:
            settings["mix"], settings["mix_options"] = mixer.mixes[0], {}
        for name, value in changes.items():
            settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
        return settings


def _default_mixer(mix: Any) -> str:
    """Return the mixer for a mix that stands alone."""
    if mix == NO_BRANCH:
        return NO_BRANCH
    if mix is None or mix == _default_mix("vq"):
        return "vq"
    return "gla"


def _default_mix(mixer: Any) -> str:
    """Return the first mix of a mixer; of one that does not exist, any mix does."""
    return CHOICES[mixer].mixes[0] if isinstance(mixer, str) and mixer in CHOICES else "outside"


def layer_numbers(spec: str) -> list[int]:
    """Return the layers that a text names: "0-3,7" -> [0, 1, 2, 3, 7].

    Raises:
        ValueError: the text is not made of layers and ranges.
    """
    numbers: list[int] = []
    for part in spec.split(","):
        first, dash, last = (text.strip() for text in part.partition("-"))
        valid = first.isdecimal()
        if dash:
            valid = valid and last.isdecimal() and len(last) < 10 and int(first) <= int(last) < MOST_LAYERS
        if not valid:
            raise ValueError(f"got '{spec}', allowed are layers and ranges, for example 0-3,7")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _overlapping_layers(specs: Iterable[str]) -> list[str]:
    """Return the problems of the keys of `layers`: malformed ones, and layers that stand in two of them."""
    problems = []
    claimed: dict[int, str] = {}
    for spec in specs:
        try:
            numbers = layer_numbers(spec)
        except ValueError as error:
            problems.append(f"layers.{spec}: {error}")
            continue
        for layer in numbers:
            if layer in claimed:
                problems.append(f"layers.{spec}: layer {layer} is already in '{claimed[layer]}'")
            claimed[layer] = spec
    return problems


def _layer_problems(settings: dict[str, Any], prefix: str) -> list[str]:
    """Return what is wrong with the settings of one layer beyond their types; `prefix` is the path of their group."""
    name, mix = settings["mixer"], settings["mix"]
    if name not in CHOICES:
        return [f"{prefix}mixer: got '{name}'; allowed are {', '.join(CHOICES)}{nearest(name, CHOICES)}"]
    mixer = CHOICES[name]
    mix_options = {option: Option(default) for option, default in MIX_OPTIONS[mix].items()}
    problems = _option_problems(f"{prefix}mixer_options", settings["mixer_options"], mixer.options)
    problems += _option_problems(f"{prefix}mix_options", settings["mix_options"], mix_options)
    if mix not in mixer.mixes:
        problems.append(f"{prefix}mix: got '{mix}', allowed with {name} is {' or '.join(mixer.mixes)}")
    window, softmax_window = settings["window"], settings["softmax_window"]
    if softmax_window is not None and softmax_window < window:
        problems.append(
            f"{prefix}softmax_window: got {softmax_window}, allowed is at least the other heads' window, {window}"
        )
    if problems:
        return problems
    if mix == "joint" and not mixer.shares_normaliser(settings["mixer_options"]):
        problems.append(
            f"{prefix}mix: {name} can give tokens negative weights or has a norm of its own, so it cannot share a "
            "normaliser (joint); allowed are sum, outside"
        )
    if settings["gate"] == "learned" and not mixer.has_gates(settings["mixer_options"]):
        problems.append(f"{prefix}gate: {name} has no gate to learn; allowed is key")
    return problems


def _option_problems(group: str, given: dict[str, Any], allowed: dict[str, Option]) -> list[str]:
    """Return what is wrong with the options of a mixer or a mix; `group` is their path."""
    problems = []
    for name, value in given.items():
        if name not in allowed:
            problems.append(unknown_key(f"{group}.{name}", name, allowed))
        elif refusal := allowed[name].refusal(value):
            problems.append(f"{group}.{name}: got {value!r}, allowed {refusal}")
    if problems:
        return problems
    chosen = {**{name: option.default for name, option in allowed.items()}, **given}
    for name, option in allowed.items():
        if option.at_most is not None and chosen[name] > chosen[option.at_most]:
            limit = chosen[option.at_most]
            problems.append(f"{group}.{name}: got {chosen[name]}, allowed is at most {option.at_most}, {limit}")
    return problems
