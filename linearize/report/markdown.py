"""Render report.md and the summary table: pure functions of the results, one section a function."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.checkpoint.work_folder import make_folder
from linearize.errors import printable
from linearize.report.results import MODELS, Check, Gate, Results
from linearize.report.tables import (
    NONE,
    Table,
    cache_rows,
    efficiency_rows,
    letter_rows,
    metric_cells,
    metric_head,
    models_of,
    number,
)

# answers shown in full; the page has all of them
SAMPLES = 3
LEGEND = (
    "Each number is a mean; ± is one bootstrapped standard error over windows, rows or items. Ratio is to the base in "
    "the same run. Recovery is the share of what window + sinks lost that the student has: 0 is window + sinks without "
    "training, 1 is the base. Over chance, where guessing scores something, it is (student - chance) / (base - "
    "chance). The difference is student minus base, paired; for perplexities it is of their logarithms. p is the "
    "probability of a difference as large if there were none: exact McNemar for items, otherwise sign flips of the "
    "paired differences."
)


def plain(text: Any) -> str:
    """Return a text of unknown origin such that Markdown and HTML show it as it is, in one line."""
    line = " ".join(printable(str(text), keep="\n\t").split())
    return _without_tags(re.sub(r"([\\`*_\[\]|])", r"\\\1", line))


def _without_tags(text: str) -> str:
    """Escape what HTML would take for a tag or a character's name."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def render_markdown(results: Results) -> str:
    """Return the report."""
    tables = results.tables
    sections = [
        f"# {plain(results.model)} beside {plain(results.base)}",
        f"**Verdict: {plain(results.verdict)}.**",
        summary_table(results),
        LEGEND,
        *([_parity(results.checks)] if results.checks else []),
        *([_gates(results.gates)] if results.gates else []),
        *(_by_position(name, rows) for name, rows in results.positions.items()),
        *(_by_depth(name, rows) for name, rows in tables.items() if name.startswith("passkey@")),
        *(_letters(name, rows) for name, rows in tables.items() if name.startswith("letters@")),
        *([_branch_share(tables["branch_share"])] if "branch_share" in tables else []),
        *([_section("Efficiency", efficiency_rows(tables["efficiency"]))] if "efficiency" in tables else []),
        _section("Cache of one sequence", cache_rows(results.cache_bytes)),
        *([_samples(tables["samples"])] if "samples" in tables else []),
        "\n".join(["## How it was measured", "", *(f"- {plain(line)}" for line in how_measured(results))]),
    ]
    return "\n\n".join(sections) + "\n"


def summary_table(results: Results) -> str:
    """Return one row a metric: base, student, ratio, recovery and paired difference, then the other models."""
    return table(metric_head(results), [metric_cells(results, metric) for metric in results.metrics])


def append_summary(path: Path, results: Results) -> None:
    """Append verdict and table to a file, such as a CI system's step summary."""
    make_folder(path.parent, "--summary-file")
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n**{plain(results.model)}: {plain(results.verdict)}**\n\n{summary_table(results)}\n")


def how_measured(results: Results) -> list[str]:
    """Return what it takes to repeat the run, and what was left out, line by line."""
    settings = ", ".join(f"{key} {value}" for key, value in results.settings.items() if value not in ("", {}))
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return [
        *(f"{key}: {value}" for key, value in results.data.items()),
        *(f"{metric.name} on {metric.data}" for metric in results.metrics if metric.data),
        f"heads linear: {results.coverage['heads_converted']} of {results.coverage['heads']}",
        f"settings: {settings}",
        f"seed {results.seed}; {results.seconds:.0f} s; {versions}",
        f"command: {results.command}",
        *results.notes,
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a cell's own bars and tags are text."""
    rows = [[_without_tags(re.sub(r"(?<!\\)\|", r"\\|", cell)) for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _section(title: str, content: Table) -> str:
    return f"## {title}\n\n{table(*content)}"


def _parity(checks: Sequence[Check]) -> str:
    rows = [
        [check.name, f"{check.difference:.1e}", f"{check.tolerance:.0e}", _outcome(check.passed)] for check in checks
    ]
    return _section("Parity", (["two computations", "largest difference", "allowed", ""], rows))


def _gates(gates: Sequence[Gate]) -> str:
    rows = [[f"`{gate.expression}`", number(gate.value), _outcome(gate.passed)] for gate in gates]
    return _section("Gates", (["gate", "value", ""], rows))


def _outcome(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _by_position(name: str, rows: list[dict[str, float]]) -> str:
    """Return perplexity by ranges of positions in the window."""
    models = models_of(rows)
    cells = [[f"{int(row['start'])}–{int(row['end']) - 1}", *(number(row[model]) for model in models)] for row in rows]
    return _section(f"{name} by position", (["positions", *(MODELS[model] for model in models)], cells))


def _by_depth(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the share of passkeys named, by the depth at which they stand."""
    models = models_of(rows)
    cells = [[str(row["depth"]), *(number(row[model]) for model in models)] for row in rows]
    return _section(f"{name} by depth", (["depth", *(MODELS[model] for model in models)], cells))


def _letters(name: str, rows: list[dict[str, Any]]) -> str:
    return _section(f"Letters chosen: {name.removeprefix('letters@')}", letter_rows(rows))


def _branch_share(rows: list[dict[str, Any]]) -> str:
    """Return the recurrent branch's share: by layer, and by query head of every linear key/value head."""
    cells = []
    for row in rows:
        shares = [f"{head}: {' '.join(f'{value:.3f}' for value in values)}" for head, values in row["shares"].items()]
        softmax_heads = ", ".join(map(str, row["softmax_heads"]))
        cells.append([str(row["layer"]), softmax_heads or NONE, "; ".join(shares) or NONE])
    head = ["layer", "softmax heads", "share by head"]
    return _section("The recurrent branch's share of the output", (head, cells))


def _samples(rows: list[dict[str, Any]]) -> str:
    """Return the first answers of all models side by side, each on one line."""
    parts = ["## Samples"]
    for row in rows[:SAMPLES]:
        answers = [f"- {MODELS[model]}: {plain(row[model])}" for model in models_of([row])]
        parts += [f"**{plain(row['prompt'])}**", "\n".join(answers)]
    return "\n\n".join(parts)
