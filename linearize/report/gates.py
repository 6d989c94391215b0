"""Gates: `metric>=x` on a number of the results, for example `perplexity@2048.ratio<=1.05`.

METRIC is a metric's name, alone (the student's value) or followed by .ratio, .recovery, .base or another model's name.
"""

import re

from linearize.errors import ConfigError, nearest
from linearize.report.results import MODELS, STUDENT, Gate, Metric

PATTERN = re.compile(r"^\s*([\w@]+?)(?:\.([a-z_]+))?\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*$")
COMPARE = {"<=": float.__le__, ">=": float.__ge__, "<": float.__lt__, ">": float.__gt__}
FIELDS = ("ratio", "recovery", *MODELS)


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


def check_gates(expressions: list[str], names: list[str]) -> None:
    """Refuses gates on metrics that will not be measured, before anything is."""
    for expression in expressions:
        metric = parse_gate(expression)[0]
        if metric not in names:
            raise ConfigError(
                f"--gate: '{metric}' is not measured here, allowed are {', '.join(names)}{nearest(metric, names)}"
            )


def evaluate_gates(expressions: list[str], metrics: tuple[Metric, ...]) -> tuple[Gate, ...]:
    """Holds every expression against the figures. A figure that does not exist or is not a number fails its gate."""
    by_name = {metric.name: metric for metric in metrics}
    gates = []
    for expression in expressions:
        metric, name, comparison, limit = parse_gate(expression)
        value = _figure(by_name[metric], name)
        gates.append(Gate(expression, value, value is not None and COMPARE[comparison](float(value), limit)))
    return tuple(gates)


def _figure(metric: Metric, name: str) -> float | None:
    if name == "ratio":
        return metric.ratio.get(STUDENT)
    if name == "recovery":
        return metric.recovery
    return metric.values[name].mean if name in metric.values else None
