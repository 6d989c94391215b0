"""Options that `convert` and `plan` share, and the settings that they make up."""

from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.options import ATTENTION, SOURCE

if TYPE_CHECKING:
    from linearize.settings.config import ConversionConfig

Model = Annotated[
    str,
    typer.Argument(help="Convert this model: a hub id, a folder of safetensors, or a .gguf file.", show_default=False),
]
Config = Annotated[
    str | None,
    typer.Option("--config", help="Start from this named config or YAML file.", rich_help_panel=ATTENTION),
]
Mixer = Annotated[
    str | None,
    typer.Option("--mixer", help="Use this recurrent mixer, or none (default: vq).", rich_help_panel=ATTENTION),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Let linear heads attend to this many recent keys through softmax (default: 512).",
        rich_help_panel=ATTENTION,
    ),
]
Sinks = Annotated[
    int | None,
    typer.Option("--sinks", help="Keep this many first tokens visible (default: 4).", rich_help_panel=ATTENTION),
]
Mix = Annotated[
    str | None,
    typer.Option(
        "--mix",
        help="Combine window and recurrent branch by sum, outside or joint (default: the mixer's own way).",
        rich_help_panel=ATTENTION,
    ),
]
KeepSoftmax = Annotated[
    str | None,
    typer.Option(
        "--keep-softmax",
        help="Choose the heads that keep softmax: auto (as few as hold what the base can do, by measured loss; "
        "default), none, all, every:N, recall:SHARE (as recall:12.5%), text:SHARE, both:SHARE, layers 0,7,18, or "
        "layer:head pairs 18:2,17:1.",
        rich_help_panel=ATTENTION,
    ),
]
Quality = Annotated[
    str | None,
    typer.Option(
        "--quality",
        help="Let --keep-softmax auto hold this share of the base's look-ups from beyond the window (default: 0.97).",
        rich_help_panel=ATTENTION,
    ),
]
CacheBudget = Annotated[
    str | None,
    typer.Option(
        "--cache-budget",
        help="Let --keep-softmax auto take at most this share of the base's cache at 32K tokens, as 15%.",
        rich_help_panel=ATTENTION,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Let --keep-softmax auto take at most this time, as 10m: with fewer rows and a cheaper score.",
        rich_help_panel=ATTENTION,
    ),
]
SoftmaxWindow = Annotated[
    int | None,
    typer.Option(
        "--softmax-window",
        help="Limit heads that keep softmax to this many recent keys, which bounds their cache (default: no limit).",
        rich_help_panel=ATTENTION,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Convert these layers: full (those without a sliding window of their own; default), all, or 0-3,7. The "
        "config key is convert_layers; a config's `layers` holds settings layer by layer.",
        rich_help_panel=ATTENTION,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set any config key, key=value; repeatable. An unknown key lists the known ones.",
        rich_help_panel=ATTENTION,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Take this branch, tag or commit from the hub.", rich_help_panel=SOURCE),
]
MergeAdapter = Annotated[
    bool,
    typer.Option(
        "--merge-adapter",
        help="Take MODEL for a PEFT adapter, and merge it into its base first.",
        rich_help_panel=SOURCE,
    ),
]
IgnoreUnexpected = Annotated[
    bool,
    typer.Option(
        "--ignore-unexpected",
        help="Keep tensors that the model has no place for, unused, instead of refusing them.",
        rich_help_panel=SOURCE,
    ),
]
TextModel = Annotated[
    bool,
    typer.Option("--text-model", help="Convert the text model inside a model for images.", rich_help_panel=SOURCE),
]


def load_settings(
    config: str | None,
    sets: list[str] | None,
    *,
    mixer: str | None,
    window: int | None,
    sinks: int | None,
    mix: str | None,
    keep_softmax: str | None,
    softmax_window: int | None,
    layers: str | None,
    quality: str | None,
    cache_budget: str | None,
    budget: str | None = None,
) -> "ConversionConfig":
    """Load the config and put the options on top; None leaves the config's own value.

    Raises:
        ConfigError: an unknown config or key, or a value that is not allowed.
    """
    from linearize.settings.loading import load_config

    flags = {
        "mixer": mixer,
        "window": window,
        "sinks": sinks,
        "mix": mix,
        "keep_softmax": keep_softmax,
        "softmax_window": softmax_window,
        "convert_layers": layers,
        "quality.target": quality,
        "quality.cache_budget": cache_budget,
        "quality.budget": budget,
    }
    return load_config(config, flags, sets)
