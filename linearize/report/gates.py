"""Judge results by gates: conditions `metric>=x` on a number, for example `perplexity@2048.ratio<=1.05`.

A gate reads METRIC[.FIELD]<=NUMBER, or with >=, < or >. METRIC is a metric's name. FIELD is ratio, recovery,
recovery_over_chance, p_value or a model's name; without a field the gate is on the student's value.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from linearize.errors import ConfigError, nearest
from linearize.report.results import MODELS, STUDENT, Gate, Metric, exceeds_noise

PATTERN = re.compile(r"^\s*([\w@]+?)(?:\.([a-z_]+))?\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*$")
COMPARE = {"<=": float.__le__, ">=": float.__ge__, "<": float.__lt__, ">": float.__gt__}
FIELDS = ("ratio", "recovery", "recovery_over_chance", "p_value", *MODELS)

# bytes of a file of gates
LARGEST_FILE = 1 << 20


class Condition(NamedTuple):
    """A gate's expression in parts: `metric.field comparison limit`."""

    metric: str
    field: str
    comparison: str
    limit: float


def parse_gate(expression: str) -> Condition:
    """Parse a gate's expression.

    Raises:
        ConfigError: it is not a gate.
    """
    match = PATTERN.match(expression)
    try:
        if match is None:
            raise ValueError
        metric, field, comparison, number = match.groups()
        limit = float(number)
    except ValueError:
        raise ConfigError(
            f"--gate: got '{expression}', allowed is METRIC[.FIELD]<=NUMBER (or >=, <, >), for example "
            "'perplexity@2048.ratio<=1.05'"
        ) from None
    field = field or STUDENT
    if field not in FIELDS:
        raise ConfigError(
            f"--gate: got the field '{field}' in '{expression}', allowed are {', '.join(FIELDS)}"
            f"{nearest(field, FIELDS)}"
        )
    return Condition(metric, field, comparison, limit)


def expand_gates(items: Sequence[str]) -> list[str]:
    """Return the expressions among the items, and those in the files among them.

    A file has one gate a line; # starts a comment.

    Raises:
        ConfigError: an item is neither an expression nor a file of them.
    """
    expressions = []
    for item in items:
        if any(sign in item for sign in "<>"):
            expressions.append(item)
        elif Path(item).is_file():
            expressions += _read_gates(Path(item))
        else:
            raise ConfigError(
                f"--gate: '{item}' is neither a file here nor a gate, METRIC[.FIELD]<=NUMBER (or >=, <, >), "
                "for example 'perplexity@2048.ratio<=1.05'"
            )
    return expressions


def _read_gates(path: Path) -> list[str]:
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"--gate: {path} has {size:,} bytes, at most {LARGEST_FILE:,} are read")
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gate: {path} cannot be read as a file of gates ({error})") from None
    if not any(lines):
        raise ConfigError(f"--gate: {path} holds no gate")
    return [line for line in lines if line]


def check_gates(expressions: list[str], fields: dict[str, set[str]], *, open_ended: bool = False) -> None:
    """Refuse gates on what will not be measured, before anything is.

    Args:
        fields: metric -> the fields it will have (`Suite.metrics`).
        open_ended: more metrics may be measured than these; a gate on one of them that is missing then fails when it
            is judged.

    Raises:
        ConfigError: no such metric or field.
    """
    for expression in expressions:
        gate = parse_gate(expression)
        if gate.metric in fields:
            allowed = [field for field in FIELDS if field in fields[gate.metric]]
            if gate.field not in allowed:
                raise ConfigError(f"--gate: {gate.metric} has no '{gate.field}' here, allowed are {', '.join(allowed)}")
        elif not open_ended:
            raise ConfigError(
                f"--gate: '{gate.metric}' is not measured here, allowed are {', '.join(fields)}"
                f"{nearest(gate.metric, fields)}"
            )


def recovery_gates(least: float, lengths: list[int], metrics: tuple[Metric, ...]) -> tuple[Gate, ...]:
    """Make a gate on the recovery of perplexity at each of the lengths.

    Where window + sinks loses nothing that exceeds the noise there is nothing to recover. The gate then holds if the
    student loses nothing that exceeds the noise.
    """
    by_name = {metric.name: metric for metric in metrics}
    gates = []
    for length in lengths:
        metric = by_name.get(f"perplexity@{length}")
        recovery = None if metric is None else metric.recovery
        if recovery is not None:
            passed = recovery >= least
        else:
            difference = None if metric is None else metric.difference
            passed = difference is not None and difference.n > 1 and not exceeds_noise(difference)
        gates.append(Gate(f"perplexity@{length}.recovery>={least}, or nothing lost", recovery, passed))
    return tuple(gates)


def evaluate_gates(expressions: list[str], metrics: tuple[Metric, ...]) -> tuple[Gate, ...]:
    """Judge the metrics by every expression. A gate on a number that does not exist, or on NaN, fails."""
    by_name = {metric.name: metric for metric in metrics}
    gates = []
    for expression in expressions:
        metric, field, comparison, limit = parse_gate(expression)
        value = _field_value(by_name[metric], field) if metric in by_name else None
        gates.append(Gate(expression, value, value is not None and COMPARE[comparison](float(value), limit)))
    return tuple(gates)


def _field_value(metric: Metric, field: str) -> float | None:
    if field == "ratio":
        return metric.ratio.get(STUDENT)
    if field in ("recovery", "recovery_over_chance", "p_value"):
        return getattr(metric, field)
    return metric.values[field].mean if field in metric.values else None
