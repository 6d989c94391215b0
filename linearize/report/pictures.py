"""Choose the pictures of a report: pure functions from results to plots, one kind of picture a function."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    Metric,
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
GREY = "#bbbbbb"
MIB = 2**20
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """Points (x, y) with the standard errors of y, NaN where there is none."""

    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """One picture: lines over x, bars over names, or a heat map.

    Attributes:
        name: file name without its ending.
        x, y: axis labels.
        lines: lines by label.
        colours: colour by label.
        log_y: True for a logarithmic y axis.
        ticks: names of 0, 1, ... on x; the lines are then drawn as bars.
        grid: rows of values for a heat map, None where there is no value.
    """

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, Line]
    colours: dict[str, str]
    log_y: bool = False
    ticks: tuple[str, ...] = ()
    grid: list[list[float | None]] | None = None

    def rows(self) -> list[list[Any]]:
        """Return the numbers behind the picture as rows of a table, a header first."""
        if self.grid is not None:
            width = max(len(row) for row in self.grid)
            return [[self.y, *range(width)], *([i, *row] for i, row in enumerate(self.grid))]
        rows: list[list[Any]] = [["line", self.x, self.y, "error"]]
        for label, line in self.lines.items():
            rows += [[label, x, y, error] for x, y, error in zip(line.x, line.y, line.errors)]
        return rows


def plots_of(results: Results) -> Iterator[Plot]:
    """Yield every picture that the results have numbers for."""
    for name, rows in results.positions.items():
        yield by_position(name, rows)
    for kind, title in (("recall", "copying"), ("associative", "associative recall"), ("passkey", "passkey")):
        yield from by_distance(kind, title, results.metrics)
    for name, rows in results.tables.items():
        if name.startswith("letters@"):
            yield letters(name, rows)
    if rows := results.tables.get("efficiency", []):
        yield from efficiency(rows)
    if rows := results.tables.get("branch_share", []):
        yield branch_share(rows)


def by_position(name: str, rows: list[dict[str, float]]) -> Plot:
    """Draw perplexity over the position in the window."""
    middles = [(row["start"] + row["end"] - 1) / 2 for row in rows]
    models = [model for model in MODELS if model in rows[0] and model != WINDOW_OFF]
    return Plot(
        name=f"{name.replace('@', '-')}-by-position",
        title=f"{name} by position",
        x="position, tokens",
        y="perplexity",
        lines={MODELS[model]: _without_errors(middles, [row[model] for row in rows]) for model in models},
        colours={MODELS[model]: COLOURS[model] for model in models},
    )


def by_distance(kind: str, title: str, metrics: Sequence[Metric]) -> Iterator[Plot]:
    """Draw the accuracy of metrics `kind`@distance over the distance, if there are any."""
    by_tokens = {int(metric.name.partition("@")[2]): metric for metric in metrics if metric.name.startswith(f"{kind}@")}
    if not by_tokens:
        return
    distances = sorted(by_tokens)
    lines = {}
    for model, label in MODELS.items():
        values = [by_tokens[distance].values.get(model) for distance in distances]
        measured = [value for value in values if value is not None]
        if len(measured) == len(values) and model != WINDOW_OFF:
            means, errors = [value.mean for value in measured], [value.error for value in measured]
            lines[label] = Line([float(distance) for distance in distances], means, errors)
    colours = {MODELS[model]: colour for model, colour in COLOURS.items()}
    yield Plot(f"{kind}-by-distance", f"{title} by distance", "tokens back", "accuracy", lines, colours)


def letters(name: str, rows: Rows) -> Plot:
    """Draw how often each letter was right, and how often each model chose it."""
    models = [model for model in MODELS if model in rows[0]]
    labels = {"right": "right", **{model: MODELS[model] for model in models}}
    places = [float(i) for i in range(len(rows))]
    return Plot(
        name=name.replace("@", "-"),
        title=f"letters chosen: {name.removeprefix('letters@')}",
        x="letter",
        y="share of answers",
        lines={label: _without_errors(places, [row[key] for row in rows]) for key, label in labels.items()},
        colours={"right": GREY, **{MODELS[model]: COLOURS[model] for model in models}},
        ticks=tuple(row["letter"] for row in rows),
    )


def efficiency(rows: Rows) -> Iterator[Plot]:
    """Draw speed and memory of base and student over the context length, one picture a quantity."""
    lengths = [float(row["length"]) for row in rows]
    quantities: tuple[tuple[str, str, str, int], ...] = (
        ("decode_tokens_per_second", "decode speed", "tokens/s", 1),
        ("prefill_tokens_per_second", "prefill speed", "tokens/s", 1),
        ("cache_bytes", "cache of one sequence", "MiB", MIB),
        ("peak_bytes", "peak memory above the weights", "MiB", MIB),
    )
    for key, title, unit, scale in quantities:
        yield Plot(
            name=key.replace("_", "-"),
            title=f"{title} by context",
            x="context, tokens",
            y=unit,
            lines={
                model: _without_errors(lengths, [row[f"{model}_{key}"] / scale for row in rows])
                for model in (BASE, STUDENT)
            },
            colours={model: COLOURS[model] for model in (BASE, STUDENT)},
            log_y=key == "cache_bytes",
        )


def branch_share(rows: Rows) -> Plot:
    """Draw the recurrent branch's share of the output as a map of layers and query heads."""
    # query heads of a key/value head
    group = max((len(shares) for row in rows for shares in row["shares"].values()), default=1)
    grid: list[list[float | None]] = []
    for row in rows:
        heads = sorted([*row["softmax_heads"], *map(int, row["shares"])])
        grid.append([share for head in heads for share in row["shares"].get(str(head)) or [None] * group])
    title = "recurrent share of the output (grey: softmax kept)"
    return Plot("branch-share", title, "query head", "layer", lines={}, colours={}, grid=grid)


def _without_errors(x: Sequence[float], y: Sequence[float]) -> Line:
    return Line(x, y, [math.nan] * len(x))
