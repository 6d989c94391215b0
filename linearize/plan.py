"""The plan of a conversion: what every layer becomes, head by head. Plain data, no torch.

Placement is per key/value head: a key/value head and the query heads that read it (its group) either keep softmax
attention or become linear together.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

FORMAT_VERSION = 1
# of the model type that a base becomes
PREFIX = "linearized_"
# the mixer of layers whose linear heads have window and sinks alone
NO_BRANCH = "none"
# the ways to mix window and recurrent branch, and the settings each has (modeling/branch.py)
MIX_OPTIONS: dict[str, dict[str, float | bool]] = {
    "outside": {"log_mass": -6.0, "branch_scale": 0.0},
    "joint": {"log_mass": 0.0},
    "sum": {"window_weight": 0.5, "recurrent_weight": 0.5, "learned": False},
    NO_BRANCH: {},
}


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer.

    Attributes:
        softmax_heads: key/value heads that keep softmax attention, ascending.
        softmax_window: keys these see, the query's own included, beside the sinks; None: all.
        mixer: name of the gated structure of the other heads (`linearize list mixers`), or "none".
        window: keys the other heads see through softmax, the query's own included.
        sinks: first tokens of a document that stay visible after they left the window.
        mix: how window and recurrent branch become one output: "sum", "outside" or "joint" (modeling/branch.py), or "none".
        gate: where gate logits come from: "key", the key projection alone, or "learned", corrected by a projection of
            the hidden states that starts at zero.
        mixer_options, mix_options: settings of the two; what is absent has its default.
        native: the layer stays as the base family has it, its own sliding window included; nothing here but
            `softmax_heads`, all of them, says anything of it.
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
        """Whether heads that are not softmax have more than window and sinks."""
        return not self.native and self.mixer != NO_BRANCH

    def linear_heads(self, key_value_heads: int) -> tuple[int, ...]:
        """The key/value heads that become linear, ascending."""
        return tuple(head for head in range(key_value_heads) if head not in self.softmax_heads)

    def with_softmax_heads(self, heads: tuple[int, ...]) -> "LayerPlan":
        return replace(self, softmax_heads=tuple(sorted(heads)))


@dataclass(frozen=True)
class Plan:
    """Every layer of a model of `base_model_type`."""

    base_model_type: str
    layers: tuple[LayerPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """What config.json carries under `linearize`."""
        layers = [{**asdict(layer), "softmax_heads": list(layer.softmax_heads)} for layer in self.layers]
        return {"format_version": FORMAT_VERSION, "base_model_type": self.base_model_type, "layers": layers}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"this linearized checkpoint has format_version {data['format_version']}, this version of linearize "
                f"reads {FORMAT_VERSION}"
            )
        layers = tuple(
            LayerPlan(**{**layer, "softmax_heads": tuple(layer["softmax_heads"])}) for layer in data["layers"]
        )
        return cls(base_model_type=data["base_model_type"], layers=layers)

    def longest_window(self) -> int:
        """Of the layers that are converted, the longest window of linear heads."""
        return max((layer.window for layer in self.layers if not layer.native), default=0)

    def linear_layers(self, key_value_heads: int) -> tuple[int, ...]:
        """Indices of the layers that have at least one linear head."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.linear_heads(key_value_heads))

    def keep_all_softmax(self, key_value_heads: int) -> "Plan":
        """The same plan with every head set to softmax, for holding the converted path against the base."""
        every = tuple(range(key_value_heads))
        layers = (replace(layer.with_softmax_heads(every), softmax_window=None) for layer in self.layers)
        return replace(self, layers=tuple(layers))
