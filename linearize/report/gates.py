"""Gates: `metric>=x` on a number of the results, for example `perplexity@2048.ratio<=1.05`.

METRIC is a metric's name, alone (the student's value) or followed by .ratio, .recovery, .base or another model's name.
"""

import json
import math
import re
from pathlib import Path

from linearize.errors import ConfigError, nearest
from linearize.report.results import BASE, MODELS, SCHEMA_VERSION, STUDENT, Gate, Metric, Results, stands_out

PATTERN = re.compile(r"^\s*([\w@]+?)(?:\.([a-z_]+))?\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*$")
COMPARE = {"<=": float.__le__, ">=": float.__ge__, "<": float.__lt__, ">": float.__gt__}
FIELDS = ("ratio", "recovery", "recovery_over_chance", "p_value", *MODELS)
# how many standard errors of the difference count as noise when a release is held against the one before
NOISE_ERRORS = 2.0
# schema version -> metrics that have meant something else since
REDEFINED = {3: ("bits_per_byte", "repetition", "distinct2", "length", "stopped")}
# what a figure without a spread may differ by on another machine
ROUNDING = 1e-4


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
            expressions += _gates_of(Path(item))
        else:
            raise ConfigError(
                f"--gate: '{item}' is neither a file here nor a gate, METRIC[.FIELD]<=NUMBER (or >=, <, >), for example "
                "'perplexity@2048.ratio<=1.05'"
            )
    return expressions


def _gates_of(path: Path) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gate: {path} cannot be read as a file of gates ({error})") from None
    if not any(lines):
        raise ConfigError(f"--gate: {path} holds no gate")
    return [line for line in lines if line]


def read_older(path: Path) -> dict:
    """The results.json of an earlier run.

    Raises:
        ConfigError: it is not one, or comes from a newer version.
    """
    try:
        older = json.loads(path.read_bytes())
        version = int(older["schema_version"])
        metrics = {
            item["name"]: {
                "better": item["better"],
                "value": item["values"].get(STUDENT),
                "base": item["values"].get(BASE),
                "difference": item.get("difference") if version == SCHEMA_VERSION else None,
                "data": item.get("data", ""),  # since version 3; before, and for most, the whole run's
            }
            for item in older["metrics"]
        }
        data = dict(older["data"])
    except OSError:
        raise ConfigError(f"--compare: no file '{path}'") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--compare: {path} is not a results.json of `linearize eval`") from None
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"--compare: {path} has schema version {version}, this linearize reads 1 to {SCHEMA_VERSION}; use a newer one"
        )
    return {"metrics": metrics, "data": data, "version": version, "path": str(path)}


def check_comparable(older: dict, data: dict) -> None:
    """Refuses an older report that was measured on other text than a run whose `Results.data` is this."""
    for key in ("text fingerprint", "tokens per length"):
        if older["data"].get(key) != data.get(key):
            raise ConfigError(
                f"--compare: {older['path']} was measured on other data ({key} {older['data'].get(key)}, here {data.get(key)})"
            )


def regression_gates(older: dict, results: Results) -> tuple[tuple[Gate, ...], tuple[str, ...]]:
    """One gate for every metric that both runs have: the student is not worse than before by more than the noise, counted
    from the base where that is the same. And notes on metrics that cannot be held against those of an older schema.

    Raises:
        ConfigError: the two were not measured on the same data, or have no metric in common.
    """
    check_comparable(older, results.data)
    changed = {name for version, names in REDEFINED.items() if version > older["version"] for name in names}
    gates, left_out = [], []
    for metric in results.metrics:
        before, now = older["metrics"].get(metric.name), metric.values.get(STUDENT)
        if before is None or now is None or before["value"] is None or before["value"]["mean"] is None:
            continue
        was, data = before["value"], before["data"]
        if metric.name.partition("@")[0] in changed or (metric.data and not data):
            left_out.append(metric.name)
            continue
        if data != metric.data:
            raise ConfigError(
                f"--compare: {metric.name} of {older['path']} was measured on other data ({data}, here {metric.data})"
            )
        words, floor = "worse than before", ROUNDING * abs(was["mean"])
        if _same_base(before, metric):
            # what both runs say of the base's own figure cancels, and with it most of the noise
            now, was = metric.difference, before["difference"]
            words, floor = "further behind the base than before", ROUNDING
        loss = (now.mean - was["mean"]) * (1 if metric.better == "lower" else -1)
        errors = [error for error in (now.error, was["error"]) if error is not None and math.isfinite(error)]
        noise = max(NOISE_ERRORS * math.hypot(*errors), floor)
        gates.append(Gate(f"{metric.name} {words} by <= {noise:.4g}", loss, math.isfinite(loss) and loss <= noise))
    if not gates:
        raise ConfigError(f"--compare: {older['path']} and this run have no metric in common")
    notes = ()
    if left_out:
        notes = (f"not compared, as schema version {older['version']} has them otherwise: {', '.join(left_out)}",)
    return tuple(gates), notes


def _same_base(before: dict, metric: Metric) -> bool:
    """Whether both runs paired their student with a base of the same figure, and know how far apart the two are."""
    pairs = [(before["base"], metric.values.get(BASE)), (before["difference"], metric.difference)]
    if any(theirs is None or theirs["mean"] is None or ours is None for theirs, ours in pairs):
        return False
    (was, now), (behind, difference) = pairs
    known = behind["error"] is not None and difference.error is not None and math.isfinite(difference.error)
    return known and math.isclose(was["mean"], now.mean, rel_tol=ROUNDING)


def check_gates(expressions: list[str], figures: dict[str, set[str]], *, open_ended: bool = False) -> None:
    """Refuses gates on figures that will not be measured, before anything is.

    Args:
        figures: metric -> its fields (`Suite.figures`).
        open_ended: more may be measured than these; then a gate on what is not fails when it is judged.
    """
    for expression in expressions:
        metric, name, *_ = parse_gate(expression)
        if metric not in figures and not open_ended:
            raise ConfigError(
                f"--gate: '{metric}' is not measured here, allowed are {', '.join(figures)}{nearest(metric, figures)}"
            )
        if name not in figures.get(metric, {name}):
            allowed = [field for field in FIELDS if field in figures[metric]]
            raise ConfigError(f"--gate: {metric} has no '{name}' here, allowed are {', '.join(allowed)}")


def check_common(older: dict, figures: dict[str, set[str]]) -> None:
    """Refuses older results that have no metric of these."""
    if not older["metrics"].keys() & figures.keys():
        raise ConfigError(f"--compare: {older['path']} and this run have no metric in common")


def recovery_gates(least: float, lengths: list[int], metrics: tuple[Metric, ...]) -> tuple[Gate, ...]:
    """Perplexity recovered at these lengths. Where window + sinks loses nothing that stands out there is nothing to
    recover, and a student that loses nothing that stands out either passes."""
    by_name = {metric.name: metric for metric in metrics}
    gates = []
    for length in lengths:
        metric = by_name.get(f"perplexity@{length}")
        value = metric and metric.recovery
        if value is not None:
            passed = value >= least
        else:
            passed = metric is not None and metric.difference.n > 1 and not stands_out(metric.difference)
        gates.append(Gate(f"perplexity@{length}.recovery>={least}, or nothing lost", value, passed))
    return tuple(gates)


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
