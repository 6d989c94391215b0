"""The one structure that every figure of an evaluation lives in. Renderers read it; nothing scrapes their output."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
GATE_FAILED = 3
BASE, STUDENT, WINDOW, UNTRAINED, BRANCH_OFF = "base", "student", "window", "untrained", "branch_off"
MODELS = {
    BASE: "base",
    STUDENT: "student",
    BRANCH_OFF: "student, recurrent branch off",
    UNTRAINED: "untrained conversion",
    WINDOW: "window + sinks, untrained",
}


@dataclass(frozen=True)
class Value:
    """One measured number: mean, standard error over n independent units (windows or rows)."""

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
        recovery: share of what window + sinks lost that the student has (1 is the base), None where nothing was lost.
        difference: student minus base paired unit by unit (of log perplexity for perplexities), with its error.
    """

    name: str
    better: str
    values: dict[str, Value]
    ratio: dict[str, float | None]
    recovery: float | None
    difference: Value | None


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

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def verdict(self) -> str:
        if not self.gates:
            return "no gates were set"
        failed = [gate.expression for gate in self.gates if not gate.passed]
        return f"FAILED: {', '.join(failed)}" if failed else f"passed {len(self.gates)} gate(s)"

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite become null."""
        return _finite({**asdict(self), "passed": self.passed, "verdict": self.verdict})


def mean_and_error(values: list[float]) -> Value:
    """Mean and its standard error; the error of a single unit is nan."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Value(mean, math.nan, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Value(mean, math.sqrt(variance / n), n)


def make_metric(name: str, better: str, units: dict[str, list[float]], *, exponentiate: bool = False) -> Metric:
    """A metric from per-unit figures of every model; with `exponentiate`, units are mean losses and values exp(mean)."""
    raw = {model: mean_and_error(values) for model, values in units.items() if values}
    values = raw
    if exponentiate:
        # delta method: the error of exp(x) is exp(x) times the error of x
        values = {m: Value(math.exp(v.mean), math.exp(v.mean) * v.error, v.n) for m, v in raw.items()}
    base = values.get(BASE)
    ratio = {m: (v.mean / base.mean if base and base.mean else None) for m, v in values.items()}
    difference = None
    if BASE in units and units.get(STUDENT):
        difference = mean_and_error([s - b for s, b in zip(units[STUDENT], units[BASE], strict=True)])
    return Metric(name, better, values, ratio, _recovery(raw), difference)


def _recovery(raw: dict[str, Value]) -> float | None:
    """(student - window) / (base - window): 0 is window + sinks without training, 1 is the base."""
    if not {BASE, STUDENT, WINDOW} <= raw.keys():
        return None
    lost = raw[BASE].mean - raw[WINDOW].mean
    if abs(lost) < 1e-9:
        return None
    return (raw[STUDENT].mean - raw[WINDOW].mean) / lost


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
