"""`linearize finetune`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, note, progress_line, quiet_libraries

TRAINING, DATA, OUTPUT = "Training", "Data", "Output"
SECONDS_BETWEEN_LINES = 10.0


def register(app: typer.Typer) -> None:
    app.command(
        cls=Command,
        epilog=examples(
            "linearize finetune --recipe lora",
            "linearize finetune linearized/my-model --recipe lora --data corpus.parquet --tokens 20000000 --batch-size 8",
            "torchrun --standalone --nproc_per_node 2 -m linearize finetune OUT --recipe lora --batch-size 2",
        ),
    )(finetune)


def finetune(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A converted folder (default: the newest conversion under ./linearized/).", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Named recipe or YAML file.", rich_help_panel=TRAINING)
    ] = "lora",
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Budget of all stages: 300K, 1M, 20M, 100M.", rich_help_panel=TRAINING),
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Tokens a row.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows a step, over all processes.", rich_help_panel=TRAINING)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate of the adapters (of what a conversion added: --set optimizer.mixer_lr=…).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="Another teacher for KL (default: the base model inside the student).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any recipe key, key=value; repeatable. An unknown one lists those there are.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="sample, a file (txt, jsonl, parquet), or a hub id; repeatable.", rich_help_panel=DATA
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder to write (default: linearized/NAME-RECIPE).", rich_help_panel=OUTPUT),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=OUTPUT)
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--no-merge", help="Write a merged checkpoint beside the adapter.", rich_help_panel=OUTPUT
        ),
    ] = True,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Recover quality: distil the base model into the linear heads with LoRA. Resumes after an interruption."""
    from linearize.settings.loading import load_recipe

    flags: dict[str, Any] = {
        "tokens": tokens,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "optimizer.lr": lr,
        "data": data or None,
    }
    settings = load_recipe(recipe, flags, set_)
    from linearize.checkpoint.outputs import newest_conversion
    from linearize.device import keep_freed_memory
    from linearize.workflows.finetune import finetune as run

    if model is None:
        model = newest_conversion()
        note(f"MODEL: {model} (the newest conversion)")
    quiet_libraries()
    keep_freed_memory()
    result = run(
        model,
        settings,
        recipe_name=recipe,
        out=out,
        teacher=teacher,
        restart=restart,
        overwrite=overwrite,
        merge=merge,
        progress=note,
        report=Reporter(),
    )
    if not result:  # not the main process
        return
    if json_:
        emit_json(result)
        return
    done = result["finetune"]
    here = (
        ""
        if done["tokens_in_these_seconds"] == done["tokens"]
        else f", {done['tokens_in_these_seconds']:,} of them now"
    )
    emit(
        f"trained {done['tokens']:,} tokens{here} in {done['seconds']:.0f} s; loss {done['first_loss']:.4f} at the first step"
        + (f" of {done['stages'][-1]['name']}" if len(done["stages"]) > 1 else "")
        + ", "
        f"{done['last_loss']:.4f} over the last ten"
    )
    emit(result["output"])


class Reporter:
    """Prints a step: on a terminal every one on the same line, elsewhere the first, the last and one every 10 s."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, step: Any) -> None:
        import sys

        now = time.monotonic()
        final = step.step == step.steps
        if not (final or sys.stderr.isatty() or now - self.last >= SECONDS_BETWEEN_LINES):
            return
        self.last = now
        progress_line(
            f"{step.stage} {step.step}/{step.steps}  {step.tokens:,} tokens  loss {step.loss:.4f}  lr {step.lr:.1e}  "
            f"{step.tokens_per_second:,.0f} tokens/s  ETA {_clock(step.eta_seconds)}  {step.memory_bytes / 2**30:.1f} GiB",
            final=final,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
