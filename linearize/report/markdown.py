"""report.md and the summary table, pure functions of the results."""

import math

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
    ]
    lines += [
        "Figures are means; ± is one standard error over windows or rows. Ratio is to the base in the same run. Recovery is "
        "the share of what window + sinks lost that the student has: 0 is window + sinks without training, 1 is the base. "
        "The difference is student minus base, paired (of log perplexity for perplexities).",
        "",
    ]
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
    lines += ["## Cache of one sequence", "", "| context | base, MiB | student, MiB | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {int(length) // 1024}K | {sizes['base'] / 2**20:,.1f} | {sizes['student'] / 2**20:,.1f} | "
        f"{sizes['student'] / sizes['base']:.3f} |"
        for length, sizes in results.cache_bytes.items()
    ]
    lines += ["", "## How it was measured", ""]
    lines += [f"- {key}: {value}" for key, value in results.data.items()]
    lines += [f"- heads linear: {results.coverage['heads_converted']} of {results.coverage['heads']}"]
    lines += [f"- settings: {', '.join(f'{k} {v}' for k, v in results.settings.items() if v not in ('', {}))}"]
    lines += [
        f"- seed {results.seed}; {results.seconds:.0f} s; " + ", ".join(f"{k} {v}" for k, v in results.versions.items())
    ]
    lines += [f"- command: `{results.command}`"]
    lines += [f"- {note}" for note in results.notes]
    return "\n".join(lines) + "\n"


def summary_table(results: Results) -> str:
    """One row a metric, one column a model, then ratio, recovery and paired difference of the student."""
    models = [model for model in MODELS if any(model in metric.values for metric in results.metrics)]
    head = ["metric", *(MODELS[model] for model in models), "ratio", "recovery", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for metric in results.metrics:
        cells = [metric.name + (" ↓" if metric.better == "lower" else " ↑")]
        cells += [_value(metric, model) for model in models]
        cells += [
            _number(metric.ratio.get(STUDENT) if BASE in metric.values else None),
            _number(metric.recovery),
            f"{metric.difference.mean:+.4f} ± {_number(metric.difference.error)}" if metric.difference else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
