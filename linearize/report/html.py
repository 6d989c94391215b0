"""Render report.html: one file that opens offline and on a phone, a pure function of the results."""

import html
from collections.abc import Sequence
from typing import Any

from linearize.errors import printable
from linearize.report.markdown import how_measured
from linearize.report.pictures import plots_of
from linearize.report.plots import svg
from linearize.report.results import MODELS, Results
from linearize.report.tables import NONE, efficiency_rows, letter_rows, metric_cells, metric_head, models_of

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1a1a1a;
       background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.banner { padding: .75rem 1rem; border-radius: .5rem; font-weight: 600; color: #fff; }
.passed { background: #1c7c3c; } .failed { background: #b3261e; } .neutral { background: #4a5568; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th { white-space: normal; vertical-align: bottom; min-width: 4.5rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
li { overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
details { margin: .5rem 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
"""


def render_html(results: Results) -> str:
    """Return the page."""
    tables = results.tables
    title = f"{_text(results.model)} beside {_text(results.base)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _banner(results),
        "<h2>Figures</h2>",
        _table(metric_head(results), [metric_cells(results, metric) for metric in results.metrics]),
        *_conditions(results),
        *_pictures(results),
        *(part for name, rows in tables.items() if name.startswith("letters@") for part in _letters(name, rows)),
    ]
    if "efficiency" in tables:
        parts += ["<h2>Efficiency</h2>", _table(*efficiency_rows(tables["efficiency"]))]
    if "samples" in tables:
        parts += ["<h2>Samples</h2>", *(_sample(row) for row in tables["samples"])]
    parts += ["<h2>How it was measured</h2><ul>", *(f"<li>{_text(line)}</li>" for line in how_measured(results))]
    return "\n".join([*parts, "</ul></body></html>", ""])


def _banner(results: Results) -> str:
    """Return the verdict on green, on red, or on grey if nothing was asked of the results."""
    kind = "passed" if results.passed else "failed"
    if results.passed and not results.gates:
        kind = "neutral"
    return f'<p class="banner {kind}" id="verdict">Verdict: {_text(results.verdict)}</p>'


def _conditions(results: Results) -> list[str]:
    """Return gates and parity checks in one table, nothing if there are none."""
    rows: list[list[Any]] = [[gate.expression, gate.value, _outcome(gate.passed)] for gate in results.gates]
    rows += [[f"parity: {check.name}", check.difference, _outcome(check.passed)] for check in results.checks]
    return ["<h2>Gates and parity</h2>", _table(["condition", "value", ""], rows)] if rows else []


def _outcome(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _pictures(results: Results) -> list[str]:
    figures = [
        f'<figure id="{plot.name}" aria-label="{_text(plot.title)}">{svg(plot)}</figure>' for plot in plots_of(results)
    ]
    return ["<h2>Pictures</h2>", f'<div class="plots">{"".join(figures)}</div>']


def _letters(name: str, rows: list[dict[str, Any]]) -> list[str]:
    return [f"<h2>Letters chosen: {_text(name.removeprefix('letters@'))}</h2>", _table(*letter_rows(rows))]


def _sample(row: dict[str, Any]) -> str:
    """Return a prompt that unfolds into the answers of all models."""
    answers = "".join(f"<p><b>{MODELS[model]}</b></p><pre>{_text(row[model])}</pre>" for model in models_of([row]))
    return f"<details><summary>{_text(row['prompt'])}</summary>{answers}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    return html.escape(printable(str(value), keep="\n\t"))
