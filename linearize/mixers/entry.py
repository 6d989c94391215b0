"""The facts about a mixer that settings need, readable without importing torch."""

import math
from dataclasses import dataclass, field
from typing import Any

from linearize.errors import nearest


@dataclass(frozen=True)
class Option:
    """One option of a mixer: its default, and the values that it allows.

    A default of True or False allows these two, and a whole number allows whole numbers above 0.

    Attributes:
        choices: the only values allowed, if there are any.
        above: the value has to be larger.
        at_least, below: the value has to be at least the first, and smaller than the second; both or none.
        at_most: name of another option; the value may not be larger than that option's.
    """

    default: float | int | bool | str
    choices: tuple[str, ...] = ()
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: str | None = None

    def refusal(self, value: Any) -> str | None:
        """Return the values that are allowed in place of this one, or None if it is allowed."""
        if self.choices:
            return (
                None if value in self.choices else f"are {', '.join(self.choices)}{nearest(str(value), self.choices)}"
            )
        if isinstance(self.default, bool):
            return None if isinstance(value, bool) else "is true or false"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "is a finite number"
        if isinstance(self.default, int) and (value != int(value) or value < 1):
            return "is a whole number above 0"
        if self.above is not None and value <= self.above:
            return f"is a number above {self.above:g}"
        if self.at_least is not None and self.below is not None and not self.at_least <= value < self.below:
            return f"is a number from {self.at_least:g} to below {self.below:g}"
        return None


@dataclass(frozen=True)
class MixerEntry:
    """Facts about a mixer.

    Attributes:
        path: "module:Class" of the implementation.
        summary, source: one line that describes it, and the papers that define it.
        options: its options by name.
        gates: its gates in order, each "channel" (one logit per key channel) or "head" (one per head). The keys drive
            them, and a learned gate can correct them. {option: {value: gates}} where an option decides.
        positive: True if no token ever gets a negative weight and no norm follows, so that window and past can share
            one normaliser. {option: values that make it so} where options decide; all of them have to hold.
        mixes: the ways in which it can meet the window, the default first.
    """

    path: str
    summary: str
    source: str
    options: dict[str, Option] = field(default_factory=dict)
    gates: tuple[str, ...] | dict[str, dict[str, tuple[str, ...]]] = ()
    positive: bool | dict[str, tuple[str, ...]] = False
    mixes: tuple[str, ...] = ("outside", "sum", "joint")

    def defaults(self) -> dict[str, Any]:
        """Return the default of every option."""
        return {name: option.default for name, option in self.options.items()}

    def gates_with(self, options: dict[str, Any]) -> tuple[str, ...]:
        """Return the gates of the mixer with these options."""
        if isinstance(self.gates, tuple):
            return self.gates
        ((option, gates_of),) = self.gates.items()
        return gates_of[{**self.defaults(), **options}[option]]

    def has_gates(self, options: dict[str, Any]) -> bool:
        """Return True if the mixer with these options has a gate that can be learned."""
        return bool(self.gates_with(options))

    def shares_normaliser(self, options: dict[str, Any]) -> bool:
        """Return True if the mixer with these options can share a normaliser with the window."""
        if isinstance(self.positive, bool):
            return self.positive
        chosen = {**self.defaults(), **options}
        return all(chosen[name] in values for name, values in self.positive.items())
