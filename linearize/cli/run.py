"""`linearize run`."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, note, quiet_libraries


def register(app: typer.Typer) -> None:
    app.command(
        cls=Command,
        epilog=examples(
            "linearize run pipeline.yaml",
            "linearize run nightly.yaml --json",
            "linearize run nightly.yaml && echo 'every gate held'",
        ),
    )(run)


def run(
    pipeline: Annotated[
        Path, typer.Argument(help="YAML file: model, out, convert, finetune, eval.", show_default=False)
    ],
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin an unfinished finetune anew, as where its settings changed.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> int:
    """Convert, finetune, evaluate and gate as one command that goes on where it stopped."""
    from linearize.cli.finetune import Reporter
    from linearize.device import keep_freed_memory
    from linearize.report.markdown import summary_table
    from linearize.report.results import GATE_FAILED
    from linearize.workflows.pipeline import load_pipeline, run_pipeline

    loaded = load_pipeline(pipeline)
    quiet_libraries()
    keep_freed_memory()
    made = run_pipeline(*loaded, restart=restart, progress=note, report=Reporter())
    results = made["results"]
    if json_:
        emit_json({**made, "results": results.to_dict() if results else None})
    else:
        if results:
            emit(summary_table(results))
            emit(f"verdict: {results.verdict}")
        emit(made["student"])
    return 0 if results is None or results.passed else GATE_FAILED
