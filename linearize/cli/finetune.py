"""`linearize finetune`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.help import Command, examples
from linearize.cli.options import OUTPUT, Json, Overwrite, model_or_newest
from linearize.cli.output import emit, emit_json, note, progress_line

if TYPE_CHECKING:
    from linearize.checkpoint.student import Student
    from linearize.training.loop import StepRecord

TRAINING, DATA = "Training", "Data"
# where progress lines do not replace each other, few enough that a log stays readable
SECONDS_BETWEEN_LINES = 10.0

Model = Annotated[
    Path | None,
    typer.Argument(
        help="Train this converted folder (default: the newest conversion under ./linearized/).", show_default=False
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Train by this named recipe or YAML file.", rich_help_panel=TRAINING)
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", help="Train on this many tokens, all stages together: 300K, 20M.", rich_help_panel=TRAINING
    ),
]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Pack rows of this many tokens.", rich_help_panel=TRAINING)
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Take this many rows a step, all processes together.", rich_help_panel=TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Train the adapters at this learning rate (the added parameters: --set optimizer.mixer_lr=…).",
        rich_help_panel=TRAINING,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help="Distil from this model (default: the base model inside the student).",
        rich_help_panel=TRAINING,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set any recipe key, key=value; repeatable. An unknown key lists the known ones.",
        rich_help_panel=TRAINING,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="Train on sample, a file (txt, jsonl, parquet), or a hub id; repeatable.", rich_help_panel=DATA
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Write this folder (default: linearized/NAME-RECIPE).", rich_help_panel=OUTPUT),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard an unfinished run and start again.", rich_help_panel=OUTPUT)
]
Merge = Annotated[
    bool,
    typer.Option("--merge/--no-merge", help="Write a merged checkpoint beside the adapter.", rich_help_panel=OUTPUT),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=Command,
        epilog=examples(
            "linearize finetune --recipe lora",
            "linearize finetune linearized/my-model --recipe lora --data corpus.parquet --tokens 20M --batch-size 8",
            "torchrun --standalone --nproc_per_node 2 -m linearize finetune OUT --recipe lora --batch-size 2",
        ),
    )(finetune)


def finetune(
    model: Model = None,
    recipe: RecipeName = "lora",
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    teacher: Teacher = None,
    set_: Set = None,
    data: Data = None,
    out: Out = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    merge: Merge = True,
    json_: Json = False,
) -> None:
    """Distil the base model into the linear heads with LoRA. Resumes after an interruption."""
    from linearize.settings.loading import load_recipe

    flags = {
        "tokens": tokens,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "optimizer.lr": lr,
        "data": data or None,
    }
    settings = load_recipe(recipe, flags, set_)
    from linearize.checkpoint.outputs import newest_conversion
    from linearize.checkpoint.student import Student
    from linearize.device import keep_freed_memory

    folder = model_or_newest(model, newest_conversion, "conversion")
    student = Student.read(folder)
    keep_freed_memory()
    from linearize.workflows.finetune import finetune as run

    trained = run(
        student, settings, recipe_name=recipe, out=out, teacher=teacher, restart=restart, overwrite=overwrite,
        merge=merge, progress=note, report=StepPrinter(),
    )  # fmt: skip
    from accelerate import PartialState

    if not PartialState().is_main_process:  # one process speaks for all
        return
    if json_:
        emit_json(trained.to_dict())
    else:
        _print_outcome(trained)


def _print_outcome(student: "Student") -> None:
    record = student.manifest.finetune
    assert record is not None, "finetune writes a record of its run"
    in_this_call = record.tokens_in_these_seconds
    resumed = "" if in_this_call is None or in_this_call == record.tokens else f", {in_this_call:,} of them now"
    stage = f" of {record.stages[-1]['name']}" if len(record.stages) > 1 else ""
    emit(
        f"trained {record.tokens:,} tokens{resumed} in {record.seconds:.0f} s; "
        f"loss {record.first_loss:.4f} at the first step{stage}, {record.last_loss:.4f} over the last ten"
    )
    emit(str(student.folder.resolve()))


class StepPrinter:
    """Print training steps: on a terminal each on the same line, elsewhere the last and one every ten seconds."""

    def __init__(self) -> None:
        self.last_printed = 0.0

    def __call__(self, step: "StepRecord") -> None:
        now = time.monotonic()
        final = step.step == step.steps
        if not (final or sys.stderr.isatty() or now - self.last_printed >= SECONDS_BETWEEN_LINES):
            return
        self.last_printed = now
        progress_line(
            f"{step.stage} {step.step}/{step.steps}  {step.tokens:,} tokens  loss {step.loss:.4f}  lr {step.lr:.1e}  "
            f"{step.tokens_per_second:,.0f} tokens/s  ETA {_clock(step.eta_seconds)}  "
            f"{step.memory_bytes / 2**30:.1f} GiB",
            final=final,
        )


def _clock(seconds: float) -> str:
    """Format a duration as hours:minutes:seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
