"""`linearize eval`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.options import OUTPUT, Json, model_or_newest, whole_numbers
from linearize.cli.output import emit, emit_json, progress_line
from linearize.errors import ConfigError

if TYPE_CHECKING:
    from linearize.report.results import Results

MEASURE, JUDGE = "Measurements", "Gates"


class Hold(StrEnum):
    auto = "auto"
    together = "together"
    in_turn = "in-turn"


Model = Annotated[
    Path | None,
    typer.Argument(
        help="Evaluate this linearized folder (default: the newest under ./linearized/).", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Compare with this base (default: the one recorded at conversion).", rich_help_panel=MEASURE
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="Read text from sample-eval, a file or a hub id; repeatable.", rich_help_panel=MEASURE),
]
SuiteName = Annotated[
    str,
    typer.Option(
        "--suite", help="Run the suite quick, standard or full; the options below override.", rich_help_panel=MEASURE
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        "--only",
        help="Measure only these parts, separated by commas: perplexity, recall, associative, passkey, choice, tasks, "
        "generation, branch, parity, efficiency.",
        rich_help_panel=MEASURE,
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--lengths", help="Measure perplexity in windows of these lengths, in tokens.", rich_help_panel=MEASURE
    ),
]
Recall = Annotated[
    str | None,
    typer.Option("--recall", help="Measure copy recall at these distances, in tokens.", rich_help_panel=MEASURE),
]
Associative = Annotated[
    str | None,
    typer.Option(
        "--associative", help="Measure associative recall at these distances, in tokens.", rich_help_panel=MEASURE
    ),
]
Passkey = Annotated[
    str | None,
    typer.Option(
        "--passkey",
        help="Hide a number in prompts of these lengths, in tokens, and ask for it.",
        rich_help_panel=MEASURE,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Take this many tokens of text for each length.", rich_help_panel=MEASURE),
]
RecallRows = Annotated[
    int | None,
    typer.Option(
        "--recall-rows", help="Take this many rows of random tokens for each distance.", rich_help_panel=MEASURE
    ),
]
PasskeyRows = Annotated[
    int | None,
    typer.Option(
        "--passkey-rows",
        help="Take this many prompts for each of three depths of every length.",
        rich_help_panel=MEASURE,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", help="Run these tasks of lm-evaluation-harness, separated by commas.", rich_help_panel=MEASURE
    ),
]
TasksDir = Annotated[
    Path | None,
    typer.Option("--tasks-dir", help="Take tasks from the files in this folder.", rich_help_panel=MEASURE),
]
Choice = Annotated[
    list[Path] | None,
    typer.Option(
        "--choice",
        help="Ask the multiple-choice items of this .jsonl file (query, choices, gold), answered by letter, options "
        "permuted; repeatable.",
        rich_help_panel=MEASURE,
    ),
]
TaskLimit = Annotated[
    int | None,
    typer.Option("--task-limit", min=1, help="Take this many items of each task or file.", rich_help_panel=MEASURE),
]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform",
        help="Also measure the same number of softmax heads spread evenly, untrained.",
        rich_help_panel=MEASURE,
    ),
]
Control = Annotated[
    Path | None,
    typer.Option(
        "--control",
        help="Also measure this folder: the base (converted with --keep-softmax all) finetuned by the same recipe.",
        rich_help_panel=MEASURE,
    ),
]
HoldModels = Annotated[
    Hold,
    typer.Option(
        "--hold",
        help="Load base and student together or in turn (auto: as memory allows).",
        rich_help_panel=MEASURE,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed the recall rows and the passkeys.", rich_help_panel=MEASURE)]
MinRecovery = Annotated[
    float | None,
    typer.Option(
        "--min-recovery",
        help="Require this recovery of perplexity at every length beyond the window.",
        rich_help_panel=JUDGE,
    ),
]
Gate = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        help="Require METRIC[.FIELD]<=NUMBER (or >=), or every line of a file of them; repeatable.",
        rich_help_panel=JUDGE,
    ),
]
Compare = Annotated[
    Path | None,
    typer.Option(
        "--compare", help="Require that no metric is worse than in this older results.json.", rich_help_panel=JUDGE
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Write the report to this folder (default: MODEL/eval).", rich_help_panel=OUTPUT),
]
SummaryFile = Annotated[
    Path | None,
    typer.Option(
        "--summary-file",
        help="Append verdict and table to this file, such as a CI system's step summary.",
        rich_help_panel=OUTPUT,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
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
    model: Model = None,
    base: Base = None,
    data: Data = None,
    suite: SuiteName = "quick",
    only: Only = None,
    lengths: Lengths = None,
    recall: Recall = None,
    associative: Associative = None,
    passkey: Passkey = None,
    max_tokens: MaxTokens = None,
    recall_rows: RecallRows = None,
    passkey_rows: PasskeyRows = None,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    choice: Choice = None,
    task_limit: TaskLimit = None,
    uniform: Uniform = False,
    control: Control = None,
    hold: HoldModels = Hold.auto,
    seed: Seed = 0,
    min_recovery: MinRecovery = None,
    gate: Gate = None,
    compare: Compare = None,
    out: Out = None,
    summary_file: SummaryFile = None,
    json_: Json = False,
) -> int:
    """Measure a student beside its base on the same data, and give a verdict."""
    from linearize.evaluation.suite import choose_suite

    measurements = choose_suite(
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
    from linearize.checkpoint.outputs import newest_output
    from linearize.checkpoint.student import Student
    from linearize.data.documents import check_dataset
    from linearize.device import keep_freed_memory
    from linearize.report.comparison import read_older

    folder = model_or_newest(model, newest_output, "output")
    # refuse what is wrong before the imports below, which take seconds
    student = Student.read(folder)
    for name in measurements.data:
        check_dataset(name)
    if compare is not None:
        read_older(compare)
    keep_freed_memory()
    from linearize.report.results import GATE_FAILED
    from linearize.workflows.evaluate import evaluate as run

    report = out or folder / "eval"
    if out is None and report.is_symlink():
        raise ConfigError(f"--out: {report} is a link; name the folder that the report goes to")
    results = run(
        student, measurements, base=base, gates=gate, min_recovery=min_recovery, compare=compare, out=report,
        summary_file=summary_file, hold=hold.value, progress=progress_line,
    )  # fmt: skip
    if json_:
        emit_json(results.to_dict())
    else:
        _print_outcome(results, report)
    return 0 if results.passed else GATE_FAILED


def _print_outcome(results: "Results", out: Path) -> None:
    from linearize.report.markdown import summary_table

    emit(summary_table(results))
    emit(f"verdict: {results.verdict}")
    emit(str(out.resolve() / "report.md"))
