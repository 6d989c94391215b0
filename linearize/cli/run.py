"""`linearize run`."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.options import Json
from linearize.cli.output import emit, emit_json, note


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
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
        Path,
        typer.Argument(
            help="Read the steps from this YAML file: model, out, convert, finetune, eval.", show_default=False
        ),
    ],
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished finetune, for example after changing its settings.")
    ] = False,
    json_: Json = False,
) -> int:
    """Convert, finetune, evaluate and gate in one command that resumes where it stopped."""
    from linearize.cli.finetune import StepPrinter
    from linearize.device import keep_freed_memory
    from linearize.report.markdown import summary_table
    from linearize.report.results import GATE_FAILED
    from linearize.workflows.pipeline import load_pipeline, run_pipeline

    steps = load_pipeline(pipeline)
    keep_freed_memory()
    outcome = run_pipeline(*steps, restart=restart, progress=note, report=StepPrinter())
    results = outcome.results
    if json_:
        emit_json(outcome.to_dict())
    else:
        if results:
            emit(summary_table(results))
            emit(f"verdict: {results.verdict}")
        emit(str(outcome.student))
    return 0 if results is None or results.passed else GATE_FAILED
