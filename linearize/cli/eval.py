"""`linearize eval`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, note, progress_line, quiet_libraries, whole_numbers

MEASURE, JUDGE, OUTPUT = "What is measured", "Judging", "Output"


class Hold(StrEnum):
    auto = "auto"
    together = "together"
    in_turn = "in-turn"


def register(app: typer.Typer) -> None:
    app.command(
        "eval",
        cls=Command,
        epilog=examples(
            "linearize eval",
            "linearize eval linearized/my-model-lora --data wikitext.txt --lengths 512,2048 --recall 64,1024",
            "linearize eval OUT --suite standard --tasks arc_easy,piqa --gate 'perplexity@2048.ratio<=1.10' --json",
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
    suite: Annotated[
        str,
        typer.Option("--suite", help="quick, standard or full; the options below override.", rich_help_panel=MEASURE),
    ] = "quick",
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Parts, with commas: perplexity, recall, associative, passkey, choice, tasks, generation, branch, parity, "
            "efficiency.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Window lengths for perplexity, in tokens.", rich_help_panel=MEASURE)
    ] = None,
    recall: Annotated[
        str | None, typer.Option("--recall", help="Distances for copy recall, in tokens.", rich_help_panel=MEASURE)
    ] = None,
    associative: Annotated[
        str | None,
        typer.Option("--associative", help="Distances for associative recall, in tokens.", rich_help_panel=MEASURE),
    ] = None,
    passkey: Annotated[
        str | None,
        typer.Option(
            "--passkey", help="Lengths of the prompts that hide a number, in tokens.", rich_help_panel=MEASURE
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Text tokens for each length.", rich_help_panel=MEASURE)
    ] = None,
    recall_rows: Annotated[
        int | None,
        typer.Option("--recall-rows", help="Rows of random tokens for each distance.", rich_help_panel=MEASURE),
    ] = None,
    passkey_rows: Annotated[
        int | None,
        typer.Option(
            "--passkey-rows", help="Prompts for each of three depths of every length.", rich_help_panel=MEASURE
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks of lm-evaluation-harness, with commas.", rich_help_panel=MEASURE),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option("--tasks-dir", help="Folder of local task files.", rich_help_panel=MEASURE)
    ] = None,
    choice: Annotated[
        list[Path] | None,
        typer.Option(
            "--choice",
            help="Multiple-choice .jsonl (query, choices, gold), answered by letter, options permuted; repeatable.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option("--task-limit", min=1, help="Items of each task or file.", rich_help_panel=MEASURE)
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Also measure as many softmax heads spread evenly, untrained.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    control: Annotated[
        Path | None,
        typer.Option(
            "--control",
            help="Also measure this folder: the base (converted with --keep-softmax all) finetuned by the same recipe.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    hold: Annotated[
        Hold,
        typer.Option(
            "--hold",
            help="Base and student in memory together or in turn (auto: what memory allows).",
            rich_help_panel=MEASURE,
        ),
    ] = Hold.auto,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the recall rows and of the passkeys.", rich_help_panel=MEASURE)
    ] = 0,
    min_recovery: Annotated[
        float | None,
        typer.Option(
            "--min-recovery",
            help="Least recovery of perplexity at every length beyond the window.",
            rich_help_panel=JUDGE,
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate", help="METRIC[.FIELD]<=NUMBER (or >=), or a file of them; repeatable.", rich_help_panel=JUDGE
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", help="An older results.json that this run must not fall behind.", rich_help_panel=JUDGE
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder for the report (default: MODEL/eval).", rich_help_panel=OUTPUT),
    ] = None,
    summary_file: Annotated[
        Path | None,
        typer.Option(
            "--summary-file", help="File to append the table to, as CI systems want it.", rich_help_panel=OUTPUT
        ),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.", rich_help_panel=OUTPUT)
    ] = False,
) -> int:
    """Measure the student beside its base on the same data, with a verdict."""
    from linearize.checkpoint.outputs import newest_output
    from linearize.device import keep_freed_memory
    from linearize.evaluation.suite import choose_suite
    from linearize.report.markdown import summary_table
    from linearize.report.results import GATE_FAILED
    from linearize.workflows.evaluate import evaluate as run

    chosen = choose_suite(
        suite,
        only,
        data=tuple(data) if data else None,
        lengths=whole_numbers("--lengths", lengths, least=2) if lengths else None,
        recall=whole_numbers("--recall", recall, least=1) if recall else None,
        associative=whole_numbers("--associative", associative, least=1) if associative else None,
        passkey=whole_numbers("--passkey", passkey, least=64) if passkey else None,
        max_tokens=max_tokens,
        recall_rows=recall_rows,
        passkey_rows=passkey_rows,
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else None,
        tasks_dir=str(tasks_dir) if tasks_dir else None,
        task_limit=task_limit,
        choice=tuple(map(str, choice)) if choice else None,
        uniform=uniform,
        control=str(control) if control else None,
        seed=seed,
    )
    if model is None:
        model = newest_output()
        note(f"MODEL: {model} (the newest output)")
    quiet_libraries()
    keep_freed_memory()
    results = run(
        model,
        chosen,
        base=base,
        gates=gate,
        min_recovery=min_recovery,
        compare=compare,
        out=out or model / "eval",
        summary_file=summary_file,
        hold=hold.value,
        progress=progress_line,
    )
    if json_:
        emit_json(results.to_dict())
    else:
        emit(summary_table(results))
        emit(f"verdict: {results.verdict}")
        emit(str((out or model / "eval").resolve() / "report.md"))
    return 0 if results.passed else GATE_FAILED
