"""Choose what an evaluation measures: the named suites, changes to them, and cuts to a model's positions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

from linearize.errors import ConfigError, nearest
from linearize.evaluation.measurement import Option
from linearize.evaluation.registry import MEASUREMENTS
from linearize.plan import Plan
from linearize.report.results import CONTROL, UNIFORM

OPTIONS: dict[str, Option] = {
    option.name: option for measurement in MEASUREMENTS.values() for option in measurement.options
}
# the options of every measurement as fields; a type checker cannot see them and takes each for Any
_MeasurementOptions: Any = make_dataclass(
    "_MeasurementOptions",
    [(name, option.annotation, field(default=option.default)) for name, option in OPTIONS.items()],
    frozen=True,
)


@dataclass(frozen=True)
class Suite(_MeasurementOptions):
    """Say what to measure, and on what.

    The options of every measurement in `registry.py` are fields as well: `lengths`, `max_tokens`, `recall` and so on.

    Attributes:
        data: evaluation texts: packaged samples, files or hub ids.
        text_field: the field of a data set's rows that holds the text.
        seed: of the random rows and of the passkeys.
        uniform: measure the layout that spreads as many softmax heads evenly, too.
        control: a folder with the base finetuned by the student's recipe, every head softmax; measured, too.
    """

    data: tuple[str, ...] = ("sample-eval",)
    text_field: str = "text"
    seed: int = 0
    uniform: bool = False
    control: str | None = None

    def models(self, names: Iterable[str]) -> set[str]:
        """Return those of the named models that are measured: the two baselines on request only if requested."""
        absent = set()
        if not self.uniform:
            absent.add(UNIFORM)
        if self.control is None:
            absent.add(CONTROL)
        return set(names) - absent

    def changed(self, **changes: Any) -> "Suite":
        """Return the suite with some settings changed."""
        return replace(self, **changes)

    def metrics(self) -> dict[str, set[str]]:
        """Return the metrics that will certainly be measured, each with its fields: models and comparisons."""
        fields: dict[str, set[str]] = {}
        for measurement in MEASUREMENTS.values():
            fields |= measurement.metrics(self)
        return fields

    @property
    def has_open_metrics(self) -> bool:
        """True if more metrics may be measured than `metrics` names."""
        return any(measurement.has_open_metrics and measurement.is_on(self) for measurement in MEASUREMENTS.values())


SUITES = {
    suite: Suite(**{name: option.suites.get(suite, option.default) for name, option in OPTIONS.items()})
    for suite in ("quick", "standard", "full")
}


def choose_suite(name: str, only: str | None = None, **changes: Any) -> Suite:
    """Return a named suite with some settings changed, cut down to the measurements of `only`.

    Args:
        name: "quick", "standard" or "full".
        only: names of measurements, separated by commas.
        changes: fields of `Suite`; None leaves the suite's own value.

    Raises:
        ConfigError: an unknown suite or measurement, or a value that is not allowed.
    """
    if name not in SUITES:
        raise ConfigError(f"--suite: got '{name}', allowed are {', '.join(SUITES)}{nearest(name, SUITES)}")
    changes = {key: value for key, value in changes.items() if value is not None}
    for key, value in changes.items():
        if key in OPTIONS and (number := OPTIONS[key].too_small(value)) is not None:
            flag, least = f"--{key.replace('_', '-')}", OPTIONS[key].least
            raise ConfigError(f"{flag}: got {number}, allowed are numbers of at least {least}")
    suite = SUITES[name].changed(**changes)
    if not 0 <= suite.seed < 2**32:
        raise ConfigError(f"--seed: got {suite.seed}, allowed are 0 to {2**32 - 1}")
    for measurement in MEASUREMENTS.values():
        measurement.check(suite)
    return suite if only is None else _cut_to_measurements(suite, name, only, changes)


def _cut_to_measurements(suite: Suite, suite_name: str, only: str, changes: dict[str, Any]) -> Suite:
    """Switch off every measurement that `only` does not name; refuse names and changes that would have no effect."""
    names = [part.strip() for part in only.split(",")]
    for name in names:
        if name not in MEASUREMENTS:
            allowed = ", ".join(MEASUREMENTS)
            raise ConfigError(f"--only: got '{name}', allowed are {allowed}{nearest(name, MEASUREMENTS)}")
        if not MEASUREMENTS[name].is_on(suite):
            raise ConfigError(f"--only: the suite {suite_name} has no {name}; say which, or take a larger one")
    unnamed = {name: measurement.switch for name, measurement in MEASUREMENTS.items() if name not in names}
    for name, switch in unnamed.items():
        if changes.get(switch.name):
            raise ConfigError(f"--{switch.name}: given, but --only leaves '{name}' out")
    return suite.changed(**{switch.name: switch.off for switch in unnamed.values()})


def cut_to_positions(suite: Suite, config: dict[str, Any]) -> tuple[Suite, list[str]]:
    """Leave out what is longer than the model's positions.

    Args:
        config: the model's config.json, for `max_position_embeddings`.

    Returns:
        The suite that fits, and a note on each option that lost items.
    """
    limit = config.get("max_position_embeddings") or math.inf
    notes, changes = [], {}
    for measurement in MEASUREMENTS.values():
        name = measurement.switch.name
        items = getattr(suite, name)
        if measurement.switch.kind is not int or not measurement.switch.is_list:
            continue
        longer = [item for item in items if measurement.positions(item) > limit]
        if longer:
            changes[name] = measurement.cut_to_positions(items, int(limit))
            notes.append(f"{name} {', '.join(map(str, longer))} left out: longer than the base's {limit} positions")
    return suite.changed(**changes), notes


def cut_to_plan(suite: Suite, plan: Plan) -> Suite:
    """Leave out the recurrent branch's own measurement where no layer has a branch."""
    return suite if any(layer.has_branch for layer in plan.layers) else suite.changed(branch=False)
