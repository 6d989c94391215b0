"""Define what a measurement is. Each one is a subclass of `Measurement` in a file of its own.

The files of measurements import torch and transformers only inside the functions that run them. `linearize eval` checks
suites, options and gates with these files, and answers a mistake before it loads either library.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.report.results import StageResult

if TYPE_CHECKING:
    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

# fields of a metric that compare the student with other models, beside the models' own values
COMPARISONS = {"ratio", "recovery", "p_value"}


@dataclass(frozen=True)
class Option:
    """One setting of a measurement. It becomes a field of `Suite` and a key of a pipeline's `eval`.

    Attributes:
        name: the field's name.
        kind: type of the value, or of each item if the default is a tuple.
        default: value where a suite names no other.
        least: smallest number that is allowed.
        suites: value by suite name ("quick", "standard", "full"), where it differs from the default.
    """

    name: str
    kind: type
    default: Any
    least: int | None = None
    suites: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, tuple)

    @property
    def annotation(self) -> Any:
        """Type of the field in `Suite`."""
        if self.is_list:
            return tuple[self.kind, ...]  # type: ignore[name-defined]  # the type is known only at run time
        return self.kind | None if self.default is None else self.kind

    @property
    def off(self) -> Any:
        """Value that leaves a measurement out: an empty tuple, zero or false."""
        return () if self.is_list else self.kind()

    def too_small(self, value: Any) -> Any:
        """Return the first number of `value` below the limit, None if there is none."""
        numbers = value if self.is_list else (value,)
        return next((number for number in numbers if self.least is not None and number < self.least), None)


@dataclass(frozen=True)
class Stage:
    """A part of an evaluation that runs as a whole. Its result is saved, and an interrupted run does not repeat it."""

    name: str
    run: Callable[[EvaluationContext], StageResult]


class Measurement(ABC):
    """One thing that an evaluation measures.

    To add one, subclass this in a new file of evaluation/, end the file with `MEASUREMENT = YourClass()`, and give the
    file a line in `registry.py`. Suites, `--only`, pipelines, gates and stages follow from the class.

    Attributes:
        name: the measurement in `--only`.
        options: settings it adds to `Suite`. The first one says what to measure; the measurement is left out where
            it is empty, zero or false.
        has_open_metrics: True if the names of its metrics are known only when it has run.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[Option, ...]]
    has_open_metrics: ClassVar[bool] = False

    @property
    def switch(self) -> Option:
        """The option that says what to measure."""
        return self.options[0]

    def is_on(self, suite: Suite) -> bool:
        """Return True if the suite includes this measurement."""
        return bool(getattr(suite, self.switch.name))

    @abstractmethod
    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        """Yield the stages that the suite asks for; `inputs` is the result of `prepare`."""

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        """Return the metrics that it will certainly yield, each with its fields: models and comparisons.

        Gates are checked against these before anything runs. A measurement that fills tables only has none.
        """
        return {}

    def window_tokens(self, suite: Suite) -> int:
        """Return the length of the longest piece of evaluation text that it needs, in tokens."""
        return 0

    def text_tokens(self, suite: Suite) -> int:
        """Return the number of text tokens that it reads in all."""
        return self.window_tokens(suite)

    def positions(self, item: int) -> int:
        """Return the number of positions that a model needs for one item of the first option."""
        return 0

    def cut_to_positions(self, items: tuple[int, ...], limit: int) -> tuple[int, ...]:
        """Return the items of the first option that fit into `limit` positions."""
        return tuple(item for item in items if self.positions(item) <= limit)

    def check(self, suite: Suite) -> None:
        """Refuse settings that contradict each other, without reading any file.

        Raises:
            ConfigError: they do.
        """
        return None

    def prepare(self, suite: Suite) -> Any:
        """Read and check the files that it needs, before any weights are loaded.

        Raises:
            ConfigError: a file is missing or malformed.
        """
        return None

    def fingerprint(self, suite: Suite, inputs: Any) -> Any:
        """Return a JSON value that changes with the content of the files that `prepare` read."""
        return None


def metric_stem(path: str) -> str:
    """Return a file's name as it stands in a metric's name."""
    return re.sub(r"\W", "_", Path(path).stem)
