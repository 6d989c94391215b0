"""`linearize bench`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, note, progress_line, quiet_libraries, whole_numbers
from linearize.errors import ConfigError

LENGTHS = (2048, 8192)


class Target(StrEnum):
    ops = "ops"
    model = "model"


def register(app: typer.Typer) -> None:
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
            help="ops: every mixer beside softmax attention; model: a linearized folder beside its base.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(help="model: a linearized folder (default: the newest).", show_default=False),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="ops: structures, with commas between (default: all).")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Sequence lengths, in tokens (default: 2048,8192, as far as they fit)."),
    ] = None,
    heads: Annotated[int, typer.Option("--heads", min=1, help="ops: heads of the one layer.")] = 9,
    dim: Annotated[int, typer.Option("--dim", min=2, help="ops: dimensions of a head.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="ops: timings of each; the median counts.")] = 5,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Time every structure, forward + backward, beside softmax attention; or a model's prefill and decode beside its base."""
    from linearize.device import keep_freed_memory

    chosen = LENGTHS if lengths is None else whole_numbers("--lengths", lengths, least=1)
    if target is Target.model and only is not None:
        raise ConfigError(f"--only: got '{only}', but a model is measured as it is; it belongs to bench ops")
    if target is Target.ops and folder is not None:
        raise ConfigError(f"FOLDER: got '{folder}', but bench ops measures no model; it belongs to bench model")
    keep_freed_memory()
    if target is Target.model:
        _bench_model(folder, chosen, json_, insisting=lengths is not None)
    else:
        _bench_ops(only, chosen, heads, dim, repeats, json_)


def _bench_model(folder: Path | None, lengths: tuple[int, ...], json_: bool, *, insisting: bool) -> None:
    from linearize.checkpoint.outputs import newest_output
    from linearize.device import compute_dtype, pick_device
    from linearize.evaluation.efficiency import DECODED, bench_model, crossovers
    from linearize.modeling.loading import load_student, positions_of
    from linearize.report.markdown import efficiency_rows, table

    if folder is None:
        folder = newest_output()
        note(f"MODEL: {folder} (the newest output)")
    quiet_libraries()
    positions = positions_of(folder) - DECODED
    if insisting and max(lengths) > positions:
        raise ConfigError(f"--lengths: got {max(lengths)}, the model has positions for {positions} and {DECODED} more")
    lengths = tuple(n for n in lengths if n <= positions) or (positions,)
    student = load_student(folder, dtype=compute_dtype("auto")).to(pick_device())
    rows = bench_model(student, lengths, progress=progress_line)
    if json_:
        emit_json({"rows": rows, "crossover": crossovers(rows)})
    else:
        emit(table(*efficiency_rows(rows)))
        for line in crossovers(rows):
            emit(line)


def _bench_ops(only: str | None, lengths: tuple[int, ...], heads: int, dim: int, repeats: int, json_: bool) -> None:
    from linearize.device import pick_device
    from linearize.workflows.bench import bench_structures, structure_names

    names = structure_names(only)
    if not json_:
        emit(f"{'structure':20} {'tokens':>7} {'softmax, ms':>12} {'structure, ms':>14} {'ratio':>6}")

    def show(row: dict) -> None:
        if not json_:
            emit(
                f"{row['structure']:20} {row['length']:7} {1000 * row['softmax_seconds']:12.0f} "
                f"{1000 * row['structure_seconds']:14.0f} {row['ratio']:6.2f}"
            )

    rows = bench_structures(
        names, lengths=lengths, heads=heads, head_dim=dim, repeats=repeats, device=pick_device(), progress=show
    )
    if json_:
        emit_json(rows)
