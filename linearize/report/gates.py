"""Gates: `metric>=x` on a number of the results, for example `perplexity@2048.ratio<=1.05`.

METRIC is a metric's name, alone (the student's value) or followed by .ratio, .recovery, .base or another model's name.
"""

import json
import math
import re
from pathlib import Path

from linearize.errors import ConfigError, nearest
from linearize.report.results import MODELS, SCHEMA_VERSION, STUDENT, Gate, Metric, Results

PATTERN = re.compile(r"^\s*([\w@]+?)(?:\.([a-z_]+))?\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*$")
COMPARE = {"<=": float.__le__, ">=": float.__ge__, "<": float.__lt__, ">": float.__gt__}
FIELDS = ("ratio", "recovery", "recovery_over_chance", "p_value", *MODELS)
# how many standard errors of the difference count as noise when a release is held against the one before
NOISE_ERRORS = 2.0


def parse_gate(expression: str) -> tuple[str, str, str, float]:
    """(metric, field, comparison, limit).

    Raises:
        ConfigError: it does not read as a gate.
    """
    match = PATTERN.match(expression)
    try:
        metric, name, comparison, limit = match.groups()
        number = float(limit)
    except (AttributeError, ValueError):
        raise ConfigError(
            f"--gate: got '{expression}', allowed is METRIC[.FIELD]<=NUMBER (or >=, <, >), for example "
            "'perplexity@2048.ratio<=1.05'"
        ) from None
    name = name or STUDENT
    if name not in FIELDS:
        raise ConfigError(
            f"--gate: got the field '{name}' in '{expression}', allowed are {', '.join(FIELDS)}{nearest(name, FIELDS)}"
        )
    return metric, name, comparison, number


def expand_gates(given: list[str]) -> list[str]:
    """Gates as given, files of them (one a line, # starts a comment) opened."""
    expressions = []
    for item in given:
        if any(sign in item for sign in "<>"):
            expressions.append(item)
        elif Path(item).is_file():
            lines = (line.partition("#")[0].strip() for line in Path(item).read_text(encoding="utf-8").splitlines())
            expressions += [line for line in lines if line]
        else:
            parse_gate(item)  # says what a gate looks like
    return expressions


def read_older(path: Path) -> dict:
    """The results.json of an earlier run.

    Raises:
        ConfigError: it is not one, or comes from a newer version.
    """
    try:
        older = json.loads(path.read_bytes())
        version = older["schema_version"]
        metrics = {
            item["name"]: (item["better"], item["values"].get(STUDENT)) for item in older["metrics"]
        }  # the same in every version so far
    except OSError:
        raise ConfigError(f"--compare: no file '{path}'") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--compare: {path} is not a results.json of `linearize eval`") from None
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"--compare: {path} has schema version {version}, this linearize reads up to {SCHEMA_VERSION}"
        )
    return {"metrics": metrics, "data": older["data"], "seed": older["seed"], "path": str(path)}


def regression_gates(older: dict, results: Results) -> tuple[Gate, ...]:
    """One gate for every metric that both runs have: the student is not worse than before by more than the noise.

    Raises:
        ConfigError: the two were not measured on the same data, or have no metric in common.
    """
    for key in ("text fingerprint", "tokens per length"):
        if older["data"].get(key) != results.data.get(key):
            raise ConfigError(
                f"--compare: {older['path']} was measured on other data ({key} {older['data'].get(key)}, here "
                f"{results.data.get(key)})"
            )
    gates = []
    for metric in results.metrics:
        better, before = older["metrics"].get(metric.name, (None, None))
        now = metric.values.get(STUDENT)
        if before is None or before["mean"] is None or now is None:
            continue
        loss = (now.mean - before["mean"]) * (1 if better == "lower" else -1)
        errors = [e for e in (now.error, before["error"]) if e is not None and math.isfinite(e)]
        noise = NOISE_ERRORS * math.hypot(*errors) if errors else 0.0
        expression = f"{metric.name} worse than before by <= {noise:.4g}"
        gates.append(Gate(expression, loss, math.isfinite(loss) and loss <= noise))
    if not gates:
        raise ConfigError(f"--compare: {older['path']} and this run have no metric in common")
    return tuple(gates)


def check_gates(expressions: list[str], names: list[str], *, open_ended: bool = False) -> None:
    """Refuses gates on metrics that will not be measured, before anything is.

    Args:
        open_ended: more may be measured than `names`; then a gate on what is not fails when it is judged.
    """
    for expression in expressions:
        metric = parse_gate(expression)[0]
        if metric not in names and not open_ended:
            raise ConfigError(
                f"--gate: '{metric}' is not measured here, allowed are {', '.join(names)}{nearest(metric, names)}"
            )


def evaluate_gates(expressions: list[str], metrics: tuple[Metric, ...]) -> tuple[Gate, ...]:
    """Holds every expression against the figures. A figure that does not exist or is not a number fails its gate."""
    by_name = {metric.name: metric for metric in metrics}
    gates = []
    for expression in expressions:
        metric, name, comparison, limit = parse_gate(expression)
        value = _figure(by_name[metric], name) if metric in by_name else None
        gates.append(Gate(expression, value, value is not None and COMPARE[comparison](float(value), limit)))
    return tuple(gates)


def _figure(metric: Metric, name: str) -> float | None:
    if name == "ratio":
        return metric.ratio.get(STUDENT)
    if name in ("recovery", "recovery_over_chance", "p_value"):
        return getattr(metric, name)
    return metric.values[name].mean if name in metric.values else None
