"""`linearize scores`."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli import conversion_options as options
from linearize.cli.help import Command, examples
from linearize.cli.options import OUTPUT, Json
from linearize.cli.output import emit, emit_json, note

Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Write this file (default: NAME.scores.json).", rich_help_panel=OUTPUT),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=Command,
        epilog=examples(
            "linearize scores HuggingFaceTB/SmolLM2-135M-Instruct",
            "linearize scores model.gguf --window 256 --json",
            "linearize scores ./model -o configs/my-model.scores.json",
        ),
    )(scores)


def scores(
    model: options.Model,
    out: Out = None,
    config: options.Config = None,
    window: options.Window = None,
    sinks: options.Sinks = None,
    layers: options.Layers = None,
    quality: options.Quality = None,
    set_: options.Set = None,
    revision: options.Revision = None,
    merge_adapter: options.MergeAdapter = False,
    text_model: options.TextModel = False,
    ignore_unexpected: options.IgnoreUnexpected = False,
    json_: Json = False,
) -> None:
    """Score the heads of a model, find how many have to keep softmax, and write a file that `convert` can use.

    Files under configs/ are found by the fingerprint of the model: with one, nobody has to score that model again.
    """
    settings = options.load_settings(
        config, set_, mixer=None, window=window, sinks=sinks, mix=None, keep_softmax="auto", softmax_window=None,
        layers=layers, quality=quality, cache_budget=None,
    )  # fmt: skip
    from linearize.workflows.scores import write_scores

    path, document = write_scores(
        model,
        settings,
        out,
        progress=note,
        revision=revision,
        merge_adapter=merge_adapter,
        text_model=text_model,
        ignore_unexpected=ignore_unexpected,
    )
    if json_:
        emit_json(document)
    else:
        emit(f"{document['found']['softmax_heads']} heads have to keep softmax")
        emit(str(path))
