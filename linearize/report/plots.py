"""Draw a report's pictures with matplotlib: SVG for the page, and PNG files with the CSV behind each."""

import csv
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.report.pictures import GREY, Plot, plots_of
from linearize.report.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches; small, so that labels can be read when the page is as wide as a phone
SIZE = (4.6, 3.6)
# share of the space between two letters that their bars take
BAR_WIDTH = 0.8


def draw(plot: Plot) -> "Figure":
    """Return the matplotlib figure of a plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    if plot.grid is not None:
        _draw_map(figure, axes, plot.grid)
    elif plot.ticks:
        _draw_bars(axes, plot)
    else:
        _draw_lines(axes, plot)
    if plot.grid is None:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.set_title(plot.title, fontsize=10)
    return figure


def _draw_map(figure: "Figure", axes: "Axes", grid: list[list[float | None]]) -> None:
    """Draw a heat map, grey where there is no value. Short rows are filled up with grey."""
    import matplotlib

    width = max(len(row) for row in grid)
    padded = [[*row, *[None] * (width - len(row))] for row in grid]
    values = [[math.nan if value is None else value for value in row] for row in padded]
    palette = matplotlib.colormaps["viridis"].with_extremes(bad=GREY)
    image = axes.imshow(values, aspect="auto", cmap=palette, vmin=0.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the norm")


def _draw_bars(axes: "Axes", plot: Plot) -> None:
    """Draw the lines as bars side by side over named places."""
    width = BAR_WIDTH / len(plot.lines)
    for index, (label, line) in enumerate(plot.lines.items()):
        centres = [x - BAR_WIDTH / 2 + width * (index + 0.5) for x in line.x]
        axes.bar(centres, line.y, width, label=label, color=plot.colours[label])
    axes.set_xticks(range(len(plot.ticks)), plot.ticks)
    axes.grid(alpha=0.25, axis="y")


def _draw_lines(axes: "Axes", plot: Plot) -> None:
    """Draw lines with error bars over a logarithmic x axis. A point with an unknown error has no visible bar."""
    for index, (label, line) in enumerate(plot.lines.items()):
        errors = [0.0 if error is None or math.isnan(error) else error for error in line.errors]
        axes.errorbar(
            line.x, line.y, yerr=errors, label=label, color=plot.colours[label], marker="o", ms=4, capsize=2,
            zorder=20 - index,  # earlier lines are drawn on top: base and student come first
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter("")
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
    axes.grid(alpha=0.25)


def svg(plot: Plot) -> str:
    """Return the picture as an <svg> element, the same for the same numbers."""
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
    """Write a PNG and the CSV behind it for every picture."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots_of(results):
        figure = draw(plot)
        figure.savefig(folder / f"{plot.name}.png", dpi=130)
        pyplot.close(figure)
        with open(folder / f"{plot.name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(plot.rows())
