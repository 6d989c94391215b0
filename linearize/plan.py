"""The plan of a conversion: the attention of every layer, head by head. Plain data, no torch.

Placement is per key/value head: a key/value head and the query heads that read it (its group) either keep softmax
attention or become linear together.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

FORMAT_VERSION = 1
# a base of model type `llama` becomes one of model type `linearized_llama`
PREFIX = "linearized_"
# the name, as mixer and as mix, for linear heads with window and sinks alone
NO_BRANCH = "none"
# the ways to mix window and recurrent branch (modeling/mix.py), each with its settings and their defaults
MIX_OPTIONS: dict[str, dict[str, float | bool]] = {
    "outside": {"log_mass": -6.0, "branch_scale": 0.0},
    "joint": {"log_mass": 0.0},
    "sum": {"window_weight": 0.5, "recurrent_weight": 0.5, "learned": False},
    NO_BRANCH: {},
}


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one attention layer.

    Attributes:
        softmax_heads: key/value heads that keep softmax attention, ascending. The other heads are linear.
        mixer: name of the linear heads' mixer (`linearize list mixers`), or "none".
        window: keys that a query of the linear heads sees through softmax, its own included.
        sinks: number of first tokens of a document that stay visible after they have left the window.
        mix: the way to make one output of window and recurrent branch: "sum", "outside", "joint" (modeling/mix.py)
            or "none".
        gate: the source of gate logits: "key" takes the key projection alone; "learned" adds a projection of the
            hidden states that starts at zero.
        mixer_options, mix_options: settings of the two; a setting that is absent has its default.
        native: true if the layer stays as the base family has it, its own sliding window included. Only
            `softmax_heads`, which then lists every head, describes such a layer.
        softmax_window: keys that a query of the softmax heads sees beside the sinks, its own included; None for all.
    """

    softmax_heads: tuple[int, ...]
    mixer: str = "gla"
    window: int = 256
    sinks: int = 4
    mix: str = "outside"
    gate: str = "key"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    mix_options: dict[str, Any] = field(default_factory=dict)
    native: bool = False
    softmax_window: int | None = None

    @property
    def has_branch(self) -> bool:
        """True if the linear heads have a recurrent branch beside window and sinks."""
        return not self.native and self.mixer != NO_BRANCH

    def linear_heads(self, key_value_heads: int) -> tuple[int, ...]:
        """Return the key/value heads that become linear, ascending."""
        return tuple(head for head in range(key_value_heads) if head not in self.softmax_heads)

    def with_softmax_heads(self, heads: tuple[int, ...]) -> "LayerPlan":
        """Return the same plan with these softmax heads."""
        return replace(self, softmax_heads=tuple(sorted(heads)))


@dataclass(frozen=True)
class Plan:
    """The plan of every layer of a model of type `base_model_type`."""

    base_model_type: str
    layers: tuple[LayerPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as config.json stores it under `linearize`."""
        layers = [{**asdict(layer), "softmax_heads": list(layer.softmax_heads)} for layer in self.layers]
        return {"format_version": FORMAT_VERSION, "base_model_type": self.base_model_type, "layers": layers}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        """Read a plan as `to_dict` wrote it.

        Raises:
            ValueError: another version of linearize wrote it in another format, or it is damaged.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list) or not data["layers"]:
            raise ValueError("not the plan of a linearized model (an object with layers)")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"this linearized checkpoint has format_version {data.get('format_version')}, this version of "
                f"linearize reads {FORMAT_VERSION}"
            )
        if not isinstance(base := data.get("base_model_type"), str):
            raise ValueError(f"base_model_type: got {base!r}, allowed is a name")
        return cls(base_model_type=base, layers=tuple(_layer_from_dict(*item) for item in enumerate(data["layers"])))

    def longest_window(self) -> int:
        """Return the longest window of the layers that are converted, in tokens; 0 if none is."""
        return max((layer.window for layer in self.layers if not layer.native), default=0)

    def linear_layers(self, key_value_heads: int) -> tuple[int, ...]:
        """Return the indices of the layers that have at least one linear head."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.linear_heads(key_value_heads))

    def keep_all_softmax(self, key_value_heads: int) -> "Plan":
        """Return the same plan with every head set to softmax, to compare the converted path with the base model."""
        all_heads = tuple(range(key_value_heads))
        layers = (replace(layer.with_softmax_heads(all_heads), softmax_window=None) for layer in self.layers)
        return replace(self, layers=tuple(layers))


def _layer_from_dict(index: int, data: Any) -> LayerPlan:
    """Read the plan of one layer.

    Raises:
        ValueError: a key is unknown or absent, or has a value that no layer can have.
    """
    if not isinstance(data, dict) or "softmax_heads" not in data:
        raise ValueError(f"layer {index}: not the plan of a layer (an object with softmax_heads)")
    if unknown := data.keys() - {entry.name for entry in fields(LayerPlan)}:
        raise ValueError(f"layer {index}: unknown key '{min(map(str, unknown))}'")
    mix_options = MIX_OPTIONS.get(str(data.get("mix", LayerPlan.mix)), {})
    allowed = {
        "softmax_heads": lambda x: isinstance(x, list) and all(map(_is_count, x)) and x == sorted(set(x)),
        "mixer": lambda x: isinstance(x, str),
        "window": lambda x: _is_count(x) and x > 0,
        "sinks": _is_count,
        "mix": lambda x: isinstance(x, str) and x in MIX_OPTIONS,
        "gate": lambda x: x in ("key", "learned"),
        "mixer_options": lambda x: isinstance(x, dict) and all(map(_is_setting, x.values())),
        "mix_options": lambda x: (
            isinstance(x, dict) and x.keys() <= mix_options.keys() and all(map(_is_setting, x.values()))
        ),
        "native": lambda x: isinstance(x, bool),
        "softmax_window": lambda x: x is None or (_is_count(x) and x > 0),
    }
    for name, value in data.items():
        if not allowed[name](value):
            raise ValueError(f"layer {index}: {name}: got {str(value)[:60]}, which no layer can have")
    return LayerPlan(**{**data, "softmax_heads": tuple(data["softmax_heads"])})


def _is_count(value: Any) -> bool:
    """Return True for a whole number that a count or a length can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_setting(value: Any) -> bool:
    """Return True for a value that a setting of a mixer or a mix can have."""
    return isinstance(value, bool | str) or (isinstance(value, int | float) and math.isfinite(value))
