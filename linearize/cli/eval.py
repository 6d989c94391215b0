"""`linearize eval`."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, note, progress_line, quiet_libraries, whole_numbers
from linearize.errors import ConfigError

MEASURE, JUDGE, OUTPUT = "What is measured", "Judging", "Output"


def register(app: typer.Typer) -> None:
    app.command(
        "eval",
        cls=Command,
        epilog=examples(
            "linearize eval",
            "linearize eval linearized/my-model-lora --data wikitext.txt --lengths 512,2048 --recall 64,1024",
            "linearize eval OUT --gate 'perplexity@2048.ratio<=1.10' --min-recovery 0.5 --json",
        ),
    )(evaluate)


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(help="A linearized folder (default: the newest under ./linearized/).", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The base model (default: the one recorded at conversion).", rich_help_panel=MEASURE
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="sample-eval, a file or a hub id; repeatable.", rich_help_panel=MEASURE),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Window lengths for perplexity, in tokens.", rich_help_panel=MEASURE)
    ] = "512,2048",
    recall: Annotated[
        str, typer.Option("--recall", help="Distances for copy recall, in tokens.", rich_help_panel=MEASURE)
    ] = "64,256,1024",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Text tokens for each length.", rich_help_panel=MEASURE)
    ] = 16384,
    recall_rows: Annotated[
        int, typer.Option("--recall-rows", help="Rows of random tokens for each distance.", rich_help_panel=MEASURE)
    ] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the recall rows.", rich_help_panel=MEASURE)] = 0,
    min_recovery: Annotated[
        float | None,
        typer.Option("--min-recovery", help="Least recovery of perplexity at every length.", rich_help_panel=JUDGE),
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", help="METRIC[.FIELD]>=NUMBER; repeatable.", rich_help_panel=JUDGE)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Folder for results.json and report.md (default: MODEL/eval).", rich_help_panel=OUTPUT
        ),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.", rich_help_panel=OUTPUT)
    ] = False,
) -> int:
    """Measure the student beside its base on the same data, with a verdict."""
    from linearize.convert import newest_output
    from linearize.device import keep_freed_memory
    from linearize.evaluate import Suite
    from linearize.evaluate import evaluate as run
    from linearize.report.markdown import summary_table
    from linearize.report.results import GATE_FAILED

    if max_tokens < 1:
        raise ConfigError(f"--max-tokens: got {max_tokens}, allowed are numbers of at least 1")
    if recall_rows < 1:
        raise ConfigError(f"--recall-rows: got {recall_rows}, allowed are numbers of at least 1")
    suite = Suite(
        data=tuple(data or ["sample-eval"]),
        lengths=whole_numbers("--lengths", lengths, least=2),
        recall=whole_numbers("--recall", recall, least=1) if recall else (),
        max_tokens=max_tokens,
        recall_rows=recall_rows,
        seed=seed,
    )
    if model is None:
        model = newest_output()
        note(f"MODEL: {model} (the newest output)")
    quiet_libraries()
    keep_freed_memory()
    results = run(
        model,
        suite,
        base=base,
        gates=gate,
        min_recovery=min_recovery,
        out=out or model / "eval",
        progress=progress_line,
    )
    if json_:
        emit_json(results.to_dict())
    else:
        emit(summary_table(results))
        emit(f"verdict: {results.verdict}")
        emit(str((out or model / "eval").resolve() / "report.md"))
    return 0 if results.passed else GATE_FAILED
