"""Define the one structure that holds every number of an evaluation. Renderers read it; nothing parses their output."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
from pydantic import TypeAdapter

from linearize.report.statistics import bootstrap_error, mcnemar, sign_flip_test, student_quantile

SCHEMA_VERSION = 3
# exit code of a run whose gates or parity checks fail
GATE_FAILED = 3
BASE, STUDENT, WINDOW, UNTRAINED, BRANCH_OFF = "base", "student", "window", "untrained", "branch_off"
WINDOW_OFF, UNIFORM, CONTROL = "window_off", "uniform", "control"
# model -> its name in reports
MODELS = {
    BASE: "base",
    STUDENT: "student",
    BRANCH_OFF: "student, recurrent branch off",
    WINDOW_OFF: "student, window off",
    UNTRAINED: "untrained conversion",
    WINDOW: "window + sinks, untrained",
    UNIFORM: "uniform layout, untrained",
    CONTROL: "control: base, same recipe",
}
# models whose next-token distributions are scored, on text and on recall rows
SCORED_MODELS = (BASE, STUDENT, BRANCH_OFF, UNTRAINED, WINDOW, UNIFORM, CONTROL)
# models that answer prompts, which costs more
ANSWERING_MODELS = (BASE, STUDENT, WINDOW, UNIFORM, CONTROL)


@dataclass(frozen=True)
class Value:
    """One measured number: the mean over n independent units (windows, rows or items) and its standard error.

    The error is bootstrapped. It is NaN for a single unit.
    """

    mean: float
    error: float
    n: int


@dataclass(frozen=True)
class Metric:
    """One metric of every model.

    Attributes:
        name: for example perplexity@2048 or recall@256.
        better: "lower" or "higher".
        values: value by model.
        ratio: mean divided by the base's mean, by model.
        recovery: (student - window) / (base - window), where "window" is window + sinks without training. 0 is that
            baseline, 1 is the base. None where the baseline loses nothing that exceeds the noise.
        difference: student minus base, paired unit by unit. For perplexities, of their logarithms.
        p_value: probability of a difference as large if there were none. Exact McNemar test for right-or-wrong items,
            otherwise a sign-flip test.
        chance: score of guessing.
        recovery_over_chance: (student - chance) / (base - chance).
        data: name and fingerprint of the metric's own data; empty for the evaluation text of the whole run.
    """

    name: str
    better: str
    values: dict[str, Value]
    ratio: dict[str, float | None]
    recovery: float | None
    difference: Value | None
    p_value: float | None = None
    chance: float | None = None
    recovery_over_chance: float | None = None
    data: str = ""


@dataclass(frozen=True)
class Check:
    """A comparison of the same logits computed in two ways.

    Attributes:
        name: the two ways.
        difference: largest difference, relative to the largest logit.
        tolerance: largest difference that passes.
    """

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the difference is within the tolerance."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class StageResult:
    """The result of one stage of an evaluation. The fields are those of `Results`."""

    metrics: tuple[Metric, ...] = ()
    positions: dict[str, list[dict[str, int | float]]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """A condition on the results, the number that it judges and its outcome."""

    expression: str
    value: float | None
    passed: bool


@dataclass(frozen=True)
class Results:
    """Everything that an evaluation measured, and everything that is needed to repeat it.

    Attributes:
        settings, coverage, cache_bytes: from the student's manifest.
        data: the evaluation text, its fingerprint and size, and the precision.
        positions: perplexity by position in the window, by metric.
        tables: numbers that are no metrics: efficiency, branch_share, samples, letters@..., passkey@...
        notes: remarks for the reader, for example on what was left out.
    """

    schema_version: int
    model: str
    base: str
    settings: dict[str, Any]
    coverage: dict[str, int]
    cache_bytes: dict[str, dict[str, int]]
    data: dict[str, Any]
    metrics: tuple[Metric, ...]
    positions: dict[str, list[dict[str, float]]]
    gates: tuple[Gate, ...]
    seed: int
    seconds: float
    versions: dict[str, str]
    command: str
    notes: tuple[str, ...] = field(default=())
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """True if every parity check and every gate passed."""
        return all(check.passed for check in self.checks) and all(gate.passed for gate in self.gates)

    @property
    def verdict(self) -> str:
        """The outcome in words, with the names of what failed."""
        failures = [f"parity: {check.name}" for check in self.checks if not check.passed]
        failures += [gate.expression for gate in self.gates if not gate.passed]
        if failures:
            return f"FAILED: {', '.join(failures)}"
        if self.gates:
            return f"passed {len(self.gates)} gate(s)"
        return "no gates were set" + (f"; passed {len(self.checks)} parity checks" if self.checks else "")

    def metric(self, name: str) -> Metric | None:
        """Return the metric of that name, None if it was not measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of results.json. Numbers that are not finite become null."""
        document = _null_for_non_finite({**asdict(self), "passed": self.passed, "verdict": self.verdict})
        for record, check in zip(document["checks"], self.checks):
            record["passed"] = check.passed
        return document


def mean_and_error(values: list[float], statistic: Callable[[Any], Any] = lambda mean: mean) -> Value:
    """Return statistic(mean of the values) with its bootstrapped standard error."""
    return Value(float(statistic(math.fsum(values) / len(values))), bootstrap_error(values, statistic), len(values))


def make_metric(
    name: str,
    better: str,
    units: dict[str, list[float]],
    *,
    exponentiate: bool = False,
    chance: float | None = None,
    items: bool = False,
    data: str = "",
) -> Metric:
    """Make a metric from the scores of every model, one score a unit. Units are paired between models.

    Args:
        better: "lower" or "higher".
        units: scores by model; models without any are left out.
        exponentiate: scores are mean losses, and values are exp(mean).
        chance: score of guessing.
        items: scores are 1 for right and 0 for wrong.
        data: name and fingerprint of the metric's own data.
    """
    units = {model: scores for model, scores in units.items() if scores}
    statistic = numpy.exp if exponentiate else lambda mean: mean
    values = {model: mean_and_error(scores, statistic) for model, scores in units.items()}
    base, student = values.get(BASE), values.get(STUDENT)
    ratio = {model: value.mean / base.mean if base and base.mean else None for model, value in values.items()}
    difference = p_value = over_chance = None
    if base and student:
        differences = [ours - theirs for ours, theirs in zip(units[STUDENT], units[BASE], strict=True)]
        difference = mean_and_error(differences)
        p_value = mcnemar(units[STUDENT], units[BASE]) if items else sign_flip_test(differences)
        if chance is not None and abs(base.mean - chance) > 1e-9:
            over_chance = (student.mean - chance) / (base.mean - chance)
    return Metric(name, better, values, ratio, _recovery(units, better), difference, p_value, chance, over_chance, data)


def _recovery(units: dict[str, list[float]], better: str) -> float | None:
    """Return (student - window) / (base - window): 0 is window + sinks without training, 1 is the base.

    None where a model is missing, or where window + sinks is not worse than the base beyond the noise.
    """
    if not {BASE, STUDENT, WINDOW} <= units.keys():
        return None
    sign = 1 if better == "lower" else -1

    def shortfall(model: str) -> Value:
        """Return how much worse a model is than the base."""
        return mean_and_error([sign * (ours - base) for ours, base in zip(units[model], units[BASE], strict=True)])

    window_shortfall = shortfall(WINDOW)
    return 1 - shortfall(STUDENT).mean / window_shortfall.mean if exceeds_noise(window_shortfall) else None


def exceeds_noise(difference: Value) -> bool:
    """Return True if a mean of paired differences is above zero beyond chance (Student's t, two-sided, 5%)."""
    if difference.n < 2:
        return False
    # 1e-9: rounding alone is no difference
    return difference.mean > max(1e-9, student_quantile(difference.n - 1) * difference.error)


def _null_for_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _null_for_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_non_finite(item) for item in value]
    return value


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of results.json; published as linearize/report/results.schema.json."""
    schema = TypeAdapter(Results).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "linearize results",
        **_with_nullable_numbers(schema),
    }


def _with_nullable_numbers(schema: Any) -> Any:
    """Allow null wherever a schema has a number, because numbers that are not finite are written as null."""
    if isinstance(schema, dict):
        if schema.get("type") == "number":
            return {**schema, "type": ["number", "null"]}
        return {key: _with_nullable_numbers(item) for key, item in schema.items()}
    return [_with_nullable_numbers(item) for item in schema] if isinstance(schema, list) else schema
