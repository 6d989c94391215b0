"""Make the tables that report.md, report.html and the command line share: a head and rows of cells, as text."""

import math
from typing import Any

from linearize.checkpoint.manifest import QualityRecord
from linearize.report.results import BASE, MODELS, STUDENT, Metric, Results

MIB = 2**20
# stands for a number that does not exist
NONE = "–"
# column of the efficiency table -> its title, and the unit in which it is shown
EFFICIENCY = {
    "prefill_tokens_per_second": ("prefill, tokens/s", 1),
    "first_token_seconds": ("first token, s", 1),
    "decode_tokens_per_second": ("decode, tokens/s", 1),
    "cache_bytes": ("cache, MiB", MIB),
    "peak_bytes": ("peak, MiB", MIB),
}
Table = tuple[list[str], list[list[str]]]


def metric_head(results: Results) -> list[str]:
    """Return the head of the summary: base and student first, the other models last."""
    others = [MODELS[model] for model in _other_models(results)]
    return ["metric", BASE, STUDENT, "ratio", "recovery", "over chance", "difference", "p", *others]


def metric_cells(results: Results, metric: Metric) -> list[str]:
    """Return the row of one metric under `metric_head`."""
    difference = metric.difference
    return [
        metric.name + (" ↓" if metric.better == "lower" else " ↑"),
        _value(metric, BASE),
        _value(metric, STUDENT),
        number(metric.ratio.get(STUDENT) if BASE in metric.values else None),
        number(metric.recovery),
        number(metric.recovery_over_chance),
        NONE if difference is None else f"{difference.mean:+.4f} ± {number(difference.error)}",
        number(metric.p_value),
        *(_value(metric, model) for model in _other_models(results)),
    ]


def letter_rows(rows: list[dict[str, Any]]) -> Table:
    """Return head and rows: how often each letter was right, and how often each model chose it."""
    models = models_of(rows)
    head = ["letter", "right", *(MODELS[model] for model in models)]
    return head, [[row["letter"], *(f"{100 * row[key]:.1f}%" for key in ("right", *models))] for row in rows]


def efficiency_rows(measurements: list[dict[str, Any]]) -> Table:
    """Return head and rows: base beside student at every context length."""
    head = ["context", *(f"{title}, {name}" for title, _ in EFFICIENCY.values() for name in (BASE, STUDENT))]
    rows = []
    for row in measurements:
        cells = [
            number(row[f"{name}_{key}"] / unit) for key, (_, unit) in EFFICIENCY.items() for name in (BASE, STUDENT)
        ]
        rows.append([f"{row['length']:,}", *cells])
    return head, rows


def cache_rows(cache_bytes: dict[str, dict[str, int]]) -> Table:
    """Return head and rows: the cache of one sequence at every context length, base beside student."""
    rows = [
        [
            f"{int(length) // 1024}K",
            f"{sizes[BASE] / MIB:,.1f}",
            f"{sizes[STUDENT] / MIB:,.1f}",
            f"{sizes[STUDENT] / sizes[BASE]:.3f}",
        ]
        for length, sizes in cache_bytes.items()
    ]
    return ["context", "base, MiB", "student, MiB", "ratio"], rows


def models_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the models that rows have columns for, in the order of reports."""
    return [model for model in MODELS if model in rows[0]]


def number(value: float | None) -> str:
    """Format a number with as many digits as its size needs, a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) >= 10000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _other_models(results: Results) -> list[str]:
    measured = {model for metric in results.metrics for model in metric.values}
    return [model for model in MODELS if model in measured and model not in (BASE, STUDENT)]


def _value(metric: Metric, model: str) -> str:
    if model not in metric.values:
        return NONE
    value = metric.values[model]
    return f"{number(value.mean)} ± {number(value.error)}"


QUALITY_COLUMNS = [
    "softmax heads",
    "window",
    "cache at 4K",
    "cache at 32K",
    "look-ups held",
    "KL from the base",
    "holds",
]


def quality_rows(quality: QualityRecord) -> Table:
    """Return head and rows of the conversions that were measured: what each costs, and what it holds of the base.

    Look-ups held is the least share over distances, of hits and of nats.
    """
    rows = []
    for trial in quality.curve:
        shares = [min(held.values()) for group, held in trial.held.items() if group.startswith("look-ups")]
        rows.append(
            [
                str(trial.softmax_heads),
                str(trial.window),
                f"{trial.cache['4096']:.3f}",
                f"{trial.cache['32768']:.3f}",
                f"{min(shares):.1%}" if shares else NONE,
                NONE if trial.divergence is None else f"{trial.divergence:.4f}",
                ("yes" if trial.holds else "no") + (", chosen" if trial == quality.chosen else ""),
            ]
        )
    return QUALITY_COLUMNS, rows
