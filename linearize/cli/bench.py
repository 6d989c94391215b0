"""`linearize bench`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.help import Command, examples
from linearize.cli.options import Json, known_names, model_or_newest, whole_numbers
from linearize.cli.output import emit, emit_json, progress_line
from linearize.errors import ConfigError, is_out_of_memory, one_line


class Target(StrEnum):
    ops = "ops"
    model = "model"


# tokens of the longest context that is timed
LONGEST = 2**24


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=Command,
        epilog=examples(
            "linearize bench ops",
            "linearize bench ops --only gla,kda --lengths 2048,8192,32768",
            "linearize bench model linearized/my-model --lengths 512,2048,8192",
        ),
    )(bench)


def bench(
    target: Annotated[
        Target,
        typer.Argument(
            help="Choose ops (every mixer beside softmax attention) or model (a linearized folder beside its base).",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(help="With model: measure this linearized folder (default: the newest).", show_default=False),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="With ops: measure these mixers, separated by commas (default: all).")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            help="Measure at these sequence lengths, in tokens (default: 2048,8192, as far as the positions go).",
        ),
    ] = None,
    heads: Annotated[
        int, typer.Option("--heads", min=1, max=4096, help="With ops: give the one layer this many heads.")
    ] = 9,
    dim: Annotated[
        int, typer.Option("--dim", min=2, max=4096, help="With ops: give each head this many dimensions.")
    ] = 64,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=1, max=10_000, help="With ops: time each this many times; the median counts."),
    ] = 5,
    json_: Json = False,
) -> None:
    """Time mixers beside softmax attention, or a linearized model beside its base."""
    tokens = whole_numbers("--lengths", lengths, least=1) if lengths is not None else None
    if tokens is not None and max(tokens) > LONGEST:
        raise ConfigError(f"--lengths: got {max(tokens)}, allowed are at most {LONGEST:,} tokens")
    if target is Target.model:
        if only is not None:
            raise ConfigError(f"--only: got '{only}', but a model is measured as it is; it belongs to bench ops")
        _bench_model(folder, tokens, json_)
    else:
        if folder is not None:
            raise ConfigError(f"FOLDER: got '{folder}', but bench ops measures no model; it belongs to bench model")
        _bench_ops(only, tokens, heads, dim, repeats, json_)


def _bench_model(folder: Path | None, lengths: tuple[int, ...] | None, json_: bool) -> None:
    from linearize.checkpoint.outputs import newest_output
    from linearize.checkpoint.student import Student
    from linearize.device import keep_freed_memory

    folder = model_or_newest(folder, newest_output, "output")
    Student.read(folder)  # refuses a wrong folder before the imports below, which take seconds
    keep_freed_memory()
    from linearize.evaluation.efficiency import crossovers
    from linearize.report.markdown import table
    from linearize.report.tables import efficiency_rows
    from linearize.workflows.bench import bench_student

    rows = bench_student(folder, lengths, progress=progress_line)
    if json_:
        emit_json({"rows": rows, "crossover": crossovers(rows)})
        return
    emit(table(*efficiency_rows(rows)))
    for line in crossovers(rows):
        emit(line)


def _bench_ops(
    only: str | None, lengths: tuple[int, ...] | None, heads: int, dim: int, repeats: int, json_: bool
) -> None:
    from linearize.device import keep_freed_memory
    from linearize.mixers.registry import MIXERS

    names = known_names("--only", only, MIXERS) if only is not None else list(MIXERS)
    keep_freed_memory()
    from linearize.workflows.bench import bench_mixers

    if not json_:
        emit(f"{'mixer':20} {'tokens':>7} {'softmax, ms':>12} {'mixer, ms':>14} {'ratio':>6}")
    try:
        rows = bench_mixers(
            names, lengths, heads=heads, head_dim=dim, repeats=repeats, report=None if json_ else _emit_timing
        )
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"bench ops: heads of {dim} dimensions cannot be timed: {one_line(error)}") from None
    if json_:
        emit_json(rows)


def _emit_timing(row: dict[str, Any]) -> None:
    emit(
        f"{row['structure']:20} {row['length']:7} {1000 * row['softmax_seconds']:12.0f} "
        f"{1000 * row['structure_seconds']:14.0f} {row['ratio']:6.2f}"
    )
