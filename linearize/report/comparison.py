"""Compare results with those of an earlier run: the student must not have become worse by more than the noise."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import ConfigError
from linearize.report.results import BASE, SCHEMA_VERSION, STUDENT, Gate, Metric, Results, Value

# standard errors of the difference that count as noise; two are about 95% of a normal spread
NOISE_ERRORS = 2.0
# relative difference that a value without a spread may show on another machine
ROUNDING = 1e-4
# schema version -> metrics that have meant something else since
REDEFINED = {3: ("bits_per_byte", "repetition", "distinct2", "length", "stopped")}


@dataclass(frozen=True)
class OlderMetric:
    """One metric of an earlier run. `value` and `difference` are the student's, `base` is the base's value.

    `data` names the metric's own data. It is empty if that is the text of the whole run, and before schema version 3.
    """

    value: Value | None
    base: Value | None
    difference: Value | None
    data: str


@dataclass(frozen=True)
class OlderResults:
    """The results.json of an earlier run, as far as it is compared.

    Attributes:
        path: the file.
        version: its schema version.
        data: its `Results.data`.
        metrics: its metrics by name.
    """

    path: str
    version: int
    data: dict[str, Any]
    metrics: dict[str, OlderMetric]


def read_older(path: Path) -> OlderResults:
    """Read the results.json of an earlier run.

    Raises:
        ConfigError: the file is no results.json, or comes from a newer version.
    """
    try:
        document = json.loads(path.read_bytes())
        version = int(document["schema_version"])
        metrics = {item["name"]: _older_metric(item, version) for item in document["metrics"]}
        data = dict(document["data"])
    except OSError:
        raise ConfigError(f"--compare: no file '{path}'") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--compare: {path} is not a results.json of `linearize eval`") from None
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"--compare: {path} has schema version {version}, this linearize reads 1 to {SCHEMA_VERSION}; "
            "use a newer one"
        )
    return OlderResults(str(path), version, data, metrics)


def _older_metric(item: dict[str, Any], version: int) -> OlderMetric:
    values = item["values"]
    # differences of an older schema were computed otherwise
    difference = _older_value(item.get("difference")) if version == SCHEMA_VERSION else None
    return OlderMetric(
        value=_older_value(values.get(STUDENT)),
        base=_older_value(values.get(BASE)),
        difference=difference,
        data=item.get("data", ""),
    )


def _older_value(value: dict[str, Any] | None) -> Value | None:
    """Read a value; None if there is none, or if its mean was not finite, which JSON has as null."""
    if value is None or value["mean"] is None:
        return None
    error = value["error"]
    return Value(float(value["mean"]), math.nan if error is None else float(error), int(value.get("n", 0)))


def check_comparable(older: OlderResults, data: dict[str, Any]) -> None:
    """Refuse older results that were measured on other text.

    Args:
        data: `Results.data` of this run.

    Raises:
        ConfigError: the text or its length differs.
    """
    for key in ("text fingerprint", "tokens per length"):
        if older.data.get(key) != data.get(key):
            raise ConfigError(
                f"--compare: {older.path} was measured on other data "
                f"({key} {older.data.get(key)}, here {data.get(key)})"
            )


def check_common(older: OlderResults, names: Iterable[str]) -> None:
    """Refuse older results that have none of the named metrics.

    Raises:
        ConfigError: they have none.
    """
    if not older.metrics.keys() & set(names):
        raise ConfigError(f"--compare: {older.path} and this run have no metric in common")


def regression_gates(older: OlderResults, results: Results) -> tuple[tuple[Gate, ...], tuple[str, ...]]:
    """Make a gate for every metric that both runs have: the student is not worse than before by more than the noise.

    The student is counted from its base where both runs have the same base.

    Returns:
        The gates, and a note on metrics that an older schema defines otherwise.

    Raises:
        ConfigError: the two were not measured on the same data, or have no metric in common.
    """
    check_comparable(older, results.data)
    redefined = {name for version, names in REDEFINED.items() if version > older.version for name in names}
    gates: list[Gate] = []
    not_compared: list[str] = []
    for metric in results.metrics:
        before, student = older.metrics.get(metric.name), metric.values.get(STUDENT)
        if before is None or before.value is None or student is None:
            continue
        if metric.name.partition("@")[0] in redefined or (metric.data and not before.data):
            not_compared.append(metric.name)
            continue
        if before.data != metric.data:
            raise ConfigError(
                f"--compare: {metric.name} of {older.path} was measured on other data "
                f"({before.data}, here {metric.data})"
            )
        gates.append(_regression_gate(metric, before.value, student, before))
    if not gates:
        raise ConfigError(f"--compare: {older.path} and this run have no metric in common")
    if not not_compared:
        return tuple(gates), ()
    note = f"not compared, as schema version {older.version} has them otherwise: {', '.join(not_compared)}"
    return tuple(gates), (note,)


def _regression_gate(metric: Metric, was: Value, now: Value, before: OlderMetric) -> Gate:
    """Judge one metric by the student's value in both runs, or by its difference from the base they share."""
    words, floor = "worse than before", ROUNDING * abs(was.mean)
    if before.difference is not None and metric.difference is not None and _same_base(before, metric):
        # the noise of the base's own value cancels
        was, now = before.difference, metric.difference
        words, floor = "further behind the base than before", ROUNDING
    loss = (now.mean - was.mean) * (1 if metric.better == "lower" else -1)
    errors = [error for error in (now.error, was.error) if math.isfinite(error)]
    noise = max(NOISE_ERRORS * math.hypot(*errors), floor)
    return Gate(f"{metric.name} {words} by <= {noise:.4g}", loss, math.isfinite(loss) and loss <= noise)


def _same_base(before: OlderMetric, metric: Metric) -> bool:
    """Return True if both runs have a base of the same value, and know how far their students are from it."""
    base = metric.values.get(BASE)
    if before.base is None or base is None or before.difference is None or metric.difference is None:
        return False
    errors_known = math.isfinite(before.difference.error) and math.isfinite(metric.difference.error)
    return errors_known and math.isclose(before.base.mean, base.mean, rel_tol=ROUNDING)
