"""The one structure that every figure of an evaluation lives in. Renderers read it; nothing scrapes their output."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from linearize.report.statistics import bootstrap_error, mcnemar, sign_flip_test, student_quantile

SCHEMA_VERSION = 3
GATE_FAILED = 3
BASE, STUDENT, WINDOW, UNTRAINED, BRANCH_OFF = "base", "student", "window", "untrained", "branch_off"
WINDOW_OFF, UNIFORM, CONTROL = "window_off", "uniform", "control"
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
# those measured on text and recall, and those that are asked to answer
ALL = (BASE, STUDENT, BRANCH_OFF, UNTRAINED, WINDOW, UNIFORM, CONTROL)
ASKED = (BASE, STUDENT, WINDOW, UNIFORM, CONTROL)


@dataclass(frozen=True)
class Value:
    """One measured number: mean, bootstrapped standard error over n independent units (windows, rows or items)."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True)
class Metric:
    """One metric of every model.

    Attributes:
        name: for example perplexity@2048 or recall@256.
        better: "lower" or "higher".
        values: model name -> value. ratio: model -> student-to-base style ratio of means.
        recovery: share of what window + sinks lost that the student has (1 is the base), None where it lost nothing that
            stands out from the noise.
        difference: student minus base paired unit by unit (of log perplexity for perplexities), with its error.
        p_value: of that difference being nothing: exact McNemar for right-or-wrong items, else flipped signs.
        chance: what guessing scores. recovery_over_chance: (student - chance) / (base - chance).
        data: what it was measured on, with a fingerprint, where that is not the evaluation text of the whole run.
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
    """Two computations of the same logits: the largest difference, relative to the largest logit."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Findings:
    """What one stage of an evaluation found."""

    metrics: tuple[Metric, ...] = ()
    positions: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """One condition and whether it held."""

    expression: str
    value: float | None
    passed: bool


@dataclass(frozen=True)
class Results:
    """Everything an evaluation measured, with what is needed to repeat it."""

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
    # figures without a place among the metrics: efficiency, branch_share, samples, letters@…, passkey@…
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        return all(part.passed for part in (*self.checks, *self.gates))

    @property
    def verdict(self) -> str:
        failed = [f"parity: {check.name}" for check in self.checks if not check.passed]
        failed += [gate.expression for gate in self.gates if not gate.passed]
        if not failed and not self.gates:
            return "no gates were set" + (f"; passed {len(self.checks)} parity checks" if self.checks else "")
        return f"FAILED: {', '.join(failed)}" if failed else f"passed {len(self.gates)} gate(s)"

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite become null."""
        record = _finite({**asdict(self), "passed": self.passed, "verdict": self.verdict})
        for written, check in zip(record["checks"], self.checks):
            written["passed"] = check.passed
        return record


def mean_and_error(values: list[float], statistic=lambda mean: mean) -> Value:
    """statistic(mean) and its standard error over the units; the error of a single unit is nan."""
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
    """A metric from per-unit figures of every model.

    Args:
        exponentiate: units are mean losses and values exp(mean).
        chance: what guessing scores.
        items: units are right (1) or wrong (0).
    """
    units = {model: values for model, values in units.items() if values}
    if exponentiate:
        import numpy

        values = {model: mean_and_error(losses, numpy.exp) for model, losses in units.items()}
    else:
        values = {model: mean_and_error(figures) for model, figures in units.items()}
    base, student = values.get(BASE), values.get(STUDENT)
    ratio = {m: (v.mean / base.mean if base and base.mean else None) for m, v in values.items()}
    difference = p_value = over_chance = None
    if base and student:
        pairs = [s - b for s, b in zip(units[STUDENT], units[BASE], strict=True)]
        difference = mean_and_error(pairs)
        p_value = mcnemar(units[STUDENT], units[BASE]) if items else sign_flip_test(pairs)
        if chance is not None and abs(base.mean - chance) > 1e-9:
            over_chance = (student.mean - chance) / (base.mean - chance)
    return Metric(name, better, values, ratio, _recovery(units, better), difference, p_value, chance, over_chance, data)


def _recovery(units: dict[str, list[float]], better: str) -> float | None:
    """(student - window) / (base - window): 0 is window + sinks without training, 1 is the base.

    None where window + sinks is not worse than the base beyond chance (Student's t of their pairs, two-sided, 5%).
    """
    if not {BASE, STUDENT, WINDOW} <= units.keys():
        return None
    sign = 1 if better == "lower" else -1
    lost, kept = (
        mean_and_error([sign * (ours - base) for ours, base in zip(units[model], units[BASE], strict=True)])
        for model in (WINDOW, STUDENT)
    )
    return 1 - kept.mean / lost.mean if stands_out(lost) else None


def stands_out(difference: Value) -> bool:
    """Whether a mean of paired differences is above nothing beyond chance (Student's t, two-sided, 5%)."""
    if difference.n < 2:
        return False
    return difference.mean > max(1e-9, student_quantile(difference.n - 1) * difference.error)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def json_schema() -> dict[str, Any]:
    """JSON Schema of results.json; published as linearize/report/results.schema.json."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Results).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "linearize results",
        **_nullable(schema),
    }


def _nullable(schema: Any) -> Any:
    """Numbers that are not finite are written as null."""
    if isinstance(schema, dict):
        if schema.get("type") == "number":
            return {**schema, "type": ["number", "null"]}
        return {key: _nullable(item) for key, item in schema.items()}
    return [_nullable(item) for item in schema] if isinstance(schema, list) else schema
