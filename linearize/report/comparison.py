"""Compare results with those of an earlier run: the student must not have become worse by more than the noise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.json_file import read_json
from linearize.errors import CheckpointError, ConfigError
from linearize.report.results import BASE, SCHEMA_VERSION, STUDENT, Gate, Metric, Results, Value

# standard errors of the difference that count as noise; two are about 95% of a normal spread
NOISE_STANDARD_ERRORS = 2.0
# difference that a number without a spread may show on another machine. It is relative to a student's value. It is
# absolute for a difference from the base, which can be zero, and which is of logarithms for perplexities.
ROUNDING = 1e-4
# schema version -> metrics that have meant something else since
REDEFINED = {3: ("bits_per_byte", "repetition", "distinct2", "length", "stopped")}


@dataclass(frozen=True)
class OlderMetric:
    """One metric of an earlier run.

    Attributes:
        value: the student's value.
        base: the base's value.
        difference: the student's difference from the base.
        data: names the metric's own data; empty if that is the text of the whole run, and before schema version 3.
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
        document = read_json(path)
        version = int(document["schema_version"])
        metrics = {item["name"]: _older_metric(item, version) for item in document["metrics"]}
        data = dict(document["data"])
    except CheckpointError as error:
        raise ConfigError(f"--compare: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ConfigError(f"--compare: {path} is not a results.json of `linearize eval`") from None
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"--compare: {path} has schema version {version}, this linearize reads 1 to {SCHEMA_VERSION}; "
            "use a newer one"
        )
    return OlderResults(str(path), version, data, metrics)


def _older_metric(item: dict[str, Any], version: int) -> OlderMetric:
    """Read one metric of a results.json of that schema version."""
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

    Where both runs have the same base, the student's difference from the base is judged in place of its value.

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
        older_metric, student = older.metrics.get(metric.name), metric.values.get(STUDENT)
        if older_metric is None or older_metric.value is None or student is None:
            continue
        if metric.name.partition("@")[0] in redefined or (metric.data and not older_metric.data):
            not_compared.append(metric.name)
            continue
        if older_metric.data != metric.data:
            raise ConfigError(
                f"--compare: {metric.name} of {older.path} was measured on other data "
                f"({older_metric.data}, here {metric.data})"
            )
        gates.append(_regression_gate(metric, student, older_metric, older_metric.value))
    if not gates:
        raise ConfigError(f"--compare: {older.path} and this run have no metric in common")
    if not not_compared:
        return tuple(gates), ()
    note = f"not compared, as schema version {older.version} has them otherwise: {', '.join(not_compared)}"
    return tuple(gates), (note,)


def _regression_gate(metric: Metric, new_value: Value, older_metric: OlderMetric, old_value: Value) -> Gate:
    """Judge how much worse the student has become in one metric.

    If both runs have the same base, the student's differences from the base are compared. Otherwise the student's
    values are compared.

    The gate allows `NOISE_STANDARD_ERRORS` standard errors of the comparison, or the rounding if that is more. An
    unknown error counts as zero. So where both errors are unknown, the rounding alone is allowed.

    Args:
        new_value, old_value: the student's value in this run and in the older run.
    """
    condition, rounding = "worse than before", ROUNDING * abs(old_value.mean)
    if older_metric.difference is not None and metric.difference is not None and _same_base(older_metric, metric):
        # the noise of the base's own value cancels
        new_value, old_value = metric.difference, older_metric.difference
        condition, rounding = "further behind the base than before", ROUNDING
    sign = 1 if metric.better == "lower" else -1
    worsening = (new_value.mean - old_value.mean) * sign
    known_errors = [error for error in (new_value.error, old_value.error) if math.isfinite(error)]
    noise = max(NOISE_STANDARD_ERRORS * math.hypot(*known_errors), rounding)
    passed = math.isfinite(worsening) and worsening <= noise
    return Gate(f"{metric.name} {condition} by <= {noise:.4g}", worsening, passed)


def _same_base(older_metric: OlderMetric, metric: Metric) -> bool:
    """Return True if the bases of both runs have the same value, and the error of both students' difference is known.

    Bases are told apart by this value alone, so two models that score alike count as one.
    """
    base = metric.values.get(BASE)
    if older_metric.base is None or base is None or older_metric.difference is None or metric.difference is None:
        return False
    errors_known = math.isfinite(older_metric.difference.error) and math.isfinite(metric.difference.error)
    return errors_known and math.isclose(older_metric.base.mean, base.mean, rel_tol=ROUNDING)
