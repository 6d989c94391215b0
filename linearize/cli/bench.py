"""`linearize bench`."""

from enum import StrEnum
from typing import Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, whole_numbers


class Target(StrEnum):
    ops = "ops"


def register(app: typer.Typer) -> None:
    app.command(
        cls=Command,
        epilog=examples(
            "linearize bench ops",
            "linearize bench ops --only gla,kda --lengths 2048,8192,32768",
            "linearize bench ops --heads 32 --dim 128 --json",
        ),
    )(bench)


def bench(
    target: Annotated[Target, typer.Argument(help="What to measure.", show_default=False)],
    only: Annotated[str | None, typer.Option("--only", help="Structures, with commas between (default: all).")] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Sequence lengths, in tokens.")] = "2048,8192",
    heads: Annotated[int, typer.Option("--heads", min=1, help="Heads of the one layer.")] = 9,
    dim: Annotated[int, typer.Option("--dim", min=2, help="Dimensions of a head.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timings of each; the median counts.")] = 5,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Time forward + backward of every structure beside softmax attention."""
    from linearize.bench import bench_structures, structure_names
    from linearize.device import keep_freed_memory, pick_device

    names = structure_names(only)
    chosen = whole_numbers("--lengths", lengths, least=1)
    keep_freed_memory()
    if not json_:
        emit(f"{'structure':20} {'tokens':>7} {'softmax, ms':>12} {'structure, ms':>14} {'ratio':>6}")

    def show(row: dict) -> None:
        if not json_:
            emit(
                f"{row['structure']:20} {row['length']:7} {1000 * row['softmax_seconds']:12.0f} "
                f"{1000 * row['structure_seconds']:14.0f} {row['ratio']:6.2f}"
            )

    rows = bench_structures(
        names, lengths=chosen, heads=heads, head_dim=dim, repeats=repeats, device=pick_device(), progress=show
    )
    if json_:
        emit_json(rows)
