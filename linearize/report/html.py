"""report.html: one file that opens offline and on a phone, a pure function of the results."""

import html
from typing import Any

from linearize.report.markdown import efficiency_rows, how_measured, letter_rows, metric_cells, metric_head
from linearize.report.plots import plots_of, svg
from linearize.report.results import MODELS, Results

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1a1a1a; background: #fff; }
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
    """The page."""
    kind = "neutral" if not results.gates and results.passed else "passed" if results.passed else "failed"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(results.model)} beside {_text(results.base)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(results.model)} beside {_text(results.base)}</h1>",
        f'<p class="banner {kind}" id="verdict">Verdict: {_text(results.verdict)}</p>',
        "<h2>Figures</h2>",
        _table(metric_head(results), [metric_cells(results, metric) for metric in results.metrics]),
    ]
    if results.gates or results.checks:
        rows = [[gate.expression, gate.value, "passed" if gate.passed else "FAILED"] for gate in results.gates]
        rows += [[f"parity: {c.name}", c.difference, "passed" if c.passed else "FAILED"] for c in results.checks]
        parts += ["<h2>Gates and parity</h2>", _table(["condition", "value", ""], rows)]
    pictures = [
        f'<figure id="{plot.name}" aria-label="{_text(plot.title)}">{svg(plot)}</figure>' for plot in plots_of(results)
    ]
    parts += ["<h2>Pictures</h2>", f'<div class="plots">{"".join(pictures)}</div>']
    for name, rows in results.tables.items():
        if name.startswith("letters@"):
            parts += [f"<h2>Letters chosen: {_text(name.removeprefix('letters@'))}</h2>", _table(*letter_rows(rows))]
    if "efficiency" in results.tables:
        parts += ["<h2>Efficiency</h2>", _table(*efficiency_rows(results.tables["efficiency"]))]
    if "samples" in results.tables:
        parts.append("<h2>Samples</h2>")
        for row in results.tables["samples"]:
            texts = "".join(
                f"<p><b>{MODELS[name]}</b></p><pre>{_text(row[name])}</pre>" for name in MODELS if name in row
            )
            parts.append(f"<details><summary>{_text(row['prompt'])}</summary>{texts}</details>")
    parts += ["<h2>How it was measured</h2><ul>", *(f"<li>{_text(line)}</li>" for line in how_measured(results))]
    return "\n".join([*parts, "</ul></body></html>", ""])


def _table(head: list[str], rows: list[list[Any]]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(_shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(cell: Any) -> str:
    return "–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _text(value: Any) -> str:
    return html.escape(str(value))
