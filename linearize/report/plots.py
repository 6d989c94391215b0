"""The report's pictures, drawn with matplotlib from the results alone: SVG for the page, PNG with its CSV for elsewhere."""

import csv
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.report.results import (
    BASE,
    BRANCH_OFF,
    CONTROL,
    MODELS,
    STUDENT,
    UNIFORM,
    UNTRAINED,
    WINDOW,
    WINDOW_OFF,
    Results,
)

COLOURS = {
    BASE: "#222222",
    STUDENT: "#0b6bcb",
    BRANCH_OFF: "#7bb4e8",
    WINDOW_OFF: "#9a6bd6",
    UNTRAINED: "#d98a1f",
    WINDOW: "#c23b3b",
    UNIFORM: "#2e9e6b",
    CONTROL: "#8a6d3b",
}
# small, so that labels can be read when the page is as wide as a phone
SIZE = (4.6, 3.6)
MIB = 2**20


@dataclass(frozen=True)
class Plot:
    """One picture: lines over x, bars over names, or a map.

    Attributes:
        lines: label -> (x values, y values, errors). ticks: the names of 0, 1, … on x; the lines are drawn as bars then.
        grid: rows of values for a map, None where there is none.
        colours: label -> colour.
    """

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, tuple[list[float], list[float], list[float]]]
    colours: dict[str, str]
    log_y: bool = False
    ticks: tuple[str, ...] = ()
    grid: list[list[float | None]] | None = None

    def rows(self) -> list[list[Any]]:
        """The numbers behind the picture, a header first."""
        if self.grid is not None:
            width = max(len(row) for row in self.grid)
            return [[self.y, *range(width)], *([i, *row] for i, row in enumerate(self.grid))]
        made = [["line", self.x, self.y, "error"]]
        for label, (xs, ys, errors) in self.lines.items():
            made += [[label, x, y, error] for x, y, error in zip(xs, ys, errors)]
        return made


def plots_of(results: Results) -> Iterator[Plot]:
    """Every picture that the results have numbers for."""
    for name, rows in results.positions.items():
        models = [model for model in MODELS if model in rows[0] and model != WINDOW_OFF]
        middle = [(row["start"] + row["end"] - 1) / 2 for row in rows]
        lines = {MODELS[m]: (middle, [row[m] for row in rows], [math.nan] * len(rows)) for m in models}
        yield Plot(
            f"{name.replace('@', '-')}-by-position", f"{name} by position", "position, tokens", "perplexity", lines,
            {MODELS[m]: COLOURS[m] for m in models},
        )  # fmt: skip
    for kind, title in (("recall", "copying"), ("associative", "associative recall"), ("passkey", "passkey")):
        metrics = sorted(
            (metric for metric in results.metrics if metric.name.startswith(f"{kind}@")),
            key=lambda metric: int(metric.name.partition("@")[2]),
        )
        if metrics:
            distances = [float(metric.name.partition("@")[2]) for metric in metrics]
            lines = {}
            for model in MODELS:
                values = [metric.values.get(model) for metric in metrics]
                if all(values) and model != WINDOW_OFF:
                    lines[MODELS[model]] = (distances, [v.mean for v in values], [v.error for v in values])
            colours = {MODELS[model]: COLOURS[model] for model in MODELS}
            yield Plot(f"{kind}-by-distance", f"{title} by distance", "tokens back", "accuracy", lines, colours)
    for name, rows in results.tables.items():
        if name.startswith("letters@"):
            models = [model for model in MODELS if model in rows[0]]
            places = [float(i) for i in range(len(rows))]
            none = [math.nan] * len(rows)
            shares = {"right": [row["right"] for row in rows], **{MODELS[m]: [row[m] for row in rows] for m in models}}
            yield Plot(
                name.replace("@", "-"), f"letters chosen: {name.removeprefix('letters@')}", "letter", "share of answers",
                {label: (places, values, none) for label, values in shares.items()},
                {"right": "#bbbbbb", **{MODELS[m]: COLOURS[m] for m in models}},
                ticks=tuple(row["letter"] for row in rows),
            )  # fmt: skip
    efficiency = results.tables.get("efficiency", [])
    if efficiency:
        lengths = [float(row["length"]) for row in efficiency]
        none = [math.nan] * len(lengths)
        for key, title, unit, scale in (
            ("decode_tokens_per_second", "decode speed", "tokens/s", 1),
            ("prefill_tokens_per_second", "prefill speed", "tokens/s", 1),
            ("cache_bytes", "cache of one sequence", "MiB", MIB),
            ("peak_bytes", "peak memory above the weights", "MiB", MIB),
        ):
            lines = {
                name: (lengths, [row[f"{name}_{key}"] / scale for row in efficiency], none) for name in (BASE, STUDENT)
            }
            yield Plot(
                key.replace("_", "-"), f"{title} by context", "context, tokens", unit, lines,
                {name: COLOURS[name] for name in lines}, log_y=key == "cache_bytes",
            )  # fmt: skip
    share = results.tables.get("branch_share", [])
    if share:
        yield Plot(
            "branch-share", "recurrent share of the output (grey: softmax kept)", "query head", "layer", {}, {},
            grid=[_share_row(row, share) for row in share],
        )  # fmt: skip


def _share_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[float | None]:
    group = max((len(heads) for other in rows for heads in other["shares"].values()), default=1)
    heads = sorted([*row["softmax_heads"], *map(int, row["shares"])])
    made: list[float | None] = []
    for head in heads:
        made += row["shares"].get(str(head)) or [None] * group
    return made


def draw(plot: Plot):
    """The matplotlib figure of a plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    if plot.grid is not None:
        width = max(len(row) for row in plot.grid)
        values = [[math.nan if v is None else v for v in row] + [math.nan] * (width - len(row)) for row in plot.grid]
        palette = matplotlib.colormaps["viridis"].with_extremes(bad="#bbbbbb")
        image = axes.imshow(values, aspect="auto", cmap=palette, vmin=0.0, interpolation="nearest")
        figure.colorbar(image, ax=axes, label="share of the norm")
    elif plot.ticks:
        width = 0.8 / len(plot.lines)
        for number, (label, (xs, ys, _)) in enumerate(plot.lines.items()):
            left = [x - 0.4 + width * (number + 0.5) for x in xs]
            axes.bar(left, ys, width, label=label, color=plot.colours[label])
        axes.set_xticks(range(len(plot.ticks)), plot.ticks)
        axes.grid(alpha=0.25, axis="y")
    else:
        for number, (label, (xs, ys, errors)) in enumerate(plot.lines.items()):
            known = [0.0 if e is None or math.isnan(e) else e for e in errors]
            # base and student come first and lie on top
            style = {"color": plot.colours[label], "marker": "o", "ms": 4, "capsize": 2, "zorder": 20 - number}
            axes.errorbar(xs, ys, yerr=known, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter("")
        if plot.log_y:
            axes.set_yscale("log")
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter(lambda y, _: f"{y:g}")
        axes.grid(alpha=0.25)
    if plot.grid is None:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.set_title(plot.title, fontsize=10)
    return figure


def svg(plot: Plot) -> str:
    """The picture as an <svg> element, the same for the same numbers."""
    import matplotlib
    from matplotlib import pyplot

    figure = draw(plot)
    # text stays text, and nothing random or dated gets into the file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def write_plots(results: Results, folder: Path) -> None:
    """A PNG and the CSV behind it for every picture."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots_of(results):
        figure = draw(plot)
        figure.savefig(folder / f"{plot.name}.png", dpi=130)
        pyplot.close(figure)
        with open(folder / f"{plot.name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(plot.rows())
