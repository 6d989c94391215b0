"""report.md and the summary table, pure functions of the results."""

import math
from pathlib import Path
from typing import Any

from linearize.report.results import BASE, MODELS, STUDENT, Metric, Results


def render_markdown(results: Results) -> str:
    """The report."""
    lines = [
        f"# {results.model} beside {results.base}",
        "",
        f"**Verdict: {results.verdict}.**",
        "",
        summary_table(results),
        "",
        "Figures are means; ± is one bootstrapped standard error over windows, rows or items. Ratio is to the base in the "
        "same run. Recovery is the share of what window + sinks lost that the student has: 0 is window + sinks without "
        "training, 1 is the base; over chance, where guessing scores something, it is (student - chance) / (base - chance). "
        "The difference is student minus base, paired (of log perplexity for perplexities), and p the probability of one as "
        "large if there were none (exact McNemar for items, else flipped signs of the paired differences).",
        "",
    ]
    if results.checks:
        lines += ["## Parity", "", "| two computations | largest difference | allowed | |", "|---|---|---|---|"]
        lines += [
            f"| {c.name} | {c.difference:.1e} | {c.tolerance:.0e} | {'passed' if c.passed else 'FAILED'} |"
            for c in results.checks
        ]
        lines.append("")
    if results.gates:
        lines += ["## Gates", "", "| gate | value | |", "|---|---|---|"]
        lines += [
            f"| `{g.expression}` | {_number(g.value)} | {'passed' if g.passed else 'FAILED'} |" for g in results.gates
        ]
        lines.append("")
    for name, rows in results.positions.items():
        models = [model for model in MODELS if model in rows[0]]
        lines += [f"## {name} by position", "", "| positions | " + " | ".join(MODELS[m] for m in models) + " |"]
        lines.append("|---" * (len(models) + 1) + "|")
        lines += [
            f"| {int(row['start'])}–{int(row['end']) - 1} | " + " | ".join(_number(row[m]) for m in models) + " |"
            for row in rows
        ]
        lines.append("")
    for name, rows in results.tables.items():
        if name.startswith("passkey@"):
            models = [model for model in MODELS if model in rows[0]]
            lines += [f"## {name} by depth", "", "| depth | " + " | ".join(MODELS[m] for m in models) + " |"]
            lines.append("|---" * (len(models) + 1) + "|")
            lines += [f"| {row['depth']} | " + " | ".join(_number(row[m]) for m in models) + " |" for row in rows]
            lines.append("")
        elif name.startswith("letters@"):
            lines += [f"## Letters chosen: {name.removeprefix('letters@')}", "", table(*letter_rows(rows)), ""]
    if "branch_share" in results.tables:
        lines += [
            "## The recurrent branch's share of the output",
            "",
            "| layer | softmax heads | share by head |",
            "|---|---|---|",
        ]
        for row in results.tables["branch_share"]:
            shares = "; ".join(
                f"{head}: {' '.join(f'{value:.3f}' for value in values)}" for head, values in row["shares"].items()
            )
            lines.append(f"| {row['layer']} | {', '.join(map(str, row['softmax_heads'])) or '–'} | {shares or '–'} |")
        lines.append("")
    if "efficiency" in results.tables:
        lines += ["## Efficiency", "", table(*efficiency_rows(results.tables["efficiency"])), ""]
    lines += ["## Cache of one sequence", "", "| context | base, MiB | student, MiB | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {int(length) // 1024}K | {sizes['base'] / 2**20:,.1f} | {sizes['student'] / 2**20:,.1f} | "
        f"{sizes['student'] / sizes['base']:.3f} |"
        for length, sizes in results.cache_bytes.items()
    ]
    if "samples" in results.tables:
        lines += ["", "## Samples", ""]
        for row in results.tables["samples"][:3]:
            lines += [f"**{row['prompt']}**", ""]
            lines += [f"- {MODELS[m]}: {' '.join(row[m].split())}" for m in MODELS if m in row]
            lines.append("")
    lines += ["", "## How it was measured", ""]
    lines += [f"- {line}" for line in how_measured(results)]
    return "\n".join(lines) + "\n"


def how_measured(results: Results) -> list[str]:
    """What it takes to repeat the run, and what was left out."""
    settings = ", ".join(f"{k} {v}" for k, v in results.settings.items() if v not in ("", {}))
    return [
        *(f"{key}: {value}" for key, value in results.data.items()),
        *(f"{metric.name} on {metric.data}" for metric in results.metrics if metric.data),
        f"heads linear: {results.coverage['heads_converted']} of {results.coverage['heads']}",
        f"settings: {settings}",
        f"seed {results.seed}; {results.seconds:.0f} s; " + ", ".join(f"{k} {v}" for k, v in results.versions.items()),
        f"command: {results.command}",
        *results.notes,
    ]


def summary_table(results: Results) -> str:
    """One row a metric: base, student, its ratio, recovery and paired difference, then the other models."""
    return table(metric_head(results), [metric_cells(results, metric) for metric in results.metrics])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def append_summary(path: Path, results: Results) -> None:
    """Adds verdict and table to a file, as CI systems show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n**{results.model}: {results.verdict}**\n\n{summary_table(results)}\n")


def _other_models(results: Results) -> list[str]:
    measured = {model for metric in results.metrics for model in metric.values}
    return [model for model in MODELS if model in measured and model not in (BASE, STUDENT)]


def metric_head(results: Results) -> list[str]:
    others = [MODELS[model] for model in _other_models(results)]
    return ["metric", BASE, STUDENT, "ratio", "recovery", "over chance", "difference", "p", *others]


def metric_cells(results: Results, metric: Metric) -> list[str]:
    """The row of one metric under `metric_head`."""
    return [
        metric.name + (" ↓" if metric.better == "lower" else " ↑"),
        _value(metric, BASE),
        _value(metric, STUDENT),
        _number(metric.ratio.get(STUDENT) if BASE in metric.values else None),
        _number(metric.recovery),
        _number(metric.recovery_over_chance),
        f"{metric.difference.mean:+.4f} ± {_number(metric.difference.error)}" if metric.difference else "–",
        _number(metric.p_value),
        *(_value(metric, model) for model in _other_models(results)),
    ]


def letter_rows(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: how often each letter was right, and how often each model chose it."""
    models = [model for model in MODELS if model in rows[0]]
    head = ["letter", "right", *(MODELS[model] for model in models)]
    return head, [[row["letter"], *(f"{100 * row[key]:.1f}%" for key in ("right", *models))] for row in rows]


def efficiency_rows(measured: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: base beside student at every context length."""
    figures = (
        ("prefill_tokens_per_second", "prefill, tokens/s", 1),
        ("first_token_seconds", "first token, s", 1),
        ("decode_tokens_per_second", "decode, tokens/s", 1),
        ("cache_bytes", "cache, MiB", 2**20),
        ("peak_bytes", "peak, MiB", 2**20),
    )
    head = ["context", *(f"{title}, {name}" for _, title, _ in figures for name in (BASE, STUDENT))]
    rows = [
        [
            f"{row['length']:,}",
            *(_number(row[f"{name}_{key}"] / unit) for key, _, unit in figures for name in (BASE, STUDENT)),
        ]
        for row in measured
    ]
    return head, rows


def _value(metric: Metric, model: str) -> str:
    if model not in metric.values:
        return "–"
    value = metric.values[model]
    return f"{_number(value.mean)} ± {_number(value.error)}"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 10000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
