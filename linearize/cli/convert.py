"""`linearize convert` and `linearize plan`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json, note, quiet_libraries

ATTENTION, OUTPUT, SOURCE = "Attention", "Output", "Source"

Model = Annotated[str, typer.Argument(help="Hub id, folder of safetensors, or .gguf file.", show_default=False)]
Config = Annotated[str | None, typer.Option("--config", help="Named config or YAML file.", rich_help_panel=ATTENTION)]
Mixer = Annotated[
    str | None, typer.Option("--mixer", help="Recurrent structure, or none (default: vq).", rich_help_panel=ATTENTION)
]
Window = Annotated[
    int | None,
    typer.Option("--window", help="Keys a linear head sees through softmax (default: 512).", rich_help_panel=ATTENTION),
]
Sinks = Annotated[
    int | None, typer.Option("--sinks", help="First tokens that stay visible (default: 4).", rich_help_panel=ATTENTION)
]
Mix = Annotated[
    str | None,
    typer.Option(
        "--mix",
        help="How window and branch meet: sum, outside or joint (default: the mixer's own).",
        rich_help_panel=ATTENTION,
    ),
]
KeepSoftmax = Annotated[
    str | None,
    typer.Option(
        "--keep-softmax",
        help="auto (recall:12.5% where the base can be run), none, all, every:N, recall:SHARE (as recall:12.5%), text:SHARE, both:SHARE, layers 0,7,18, or layer:head pairs 18:2,17:1.",
        rich_help_panel=ATTENTION,
    ),
]
SoftmaxWindow = Annotated[
    int | None,
    typer.Option(
        "--softmax-window",
        help="Window of the heads that keep softmax, in keys; it bounds their cache (default: they see all).",
        rich_help_panel=ATTENTION,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Layers to convert: full (those without a sliding window of their own; default), all, or 0-3,7. The config "
        "key is convert_layers; a config's `layers` holds settings layer by layer.",
        rich_help_panel=ATTENTION,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any config key, key=value; repeatable. An unknown one lists those there are.",
        rich_help_panel=ATTENTION,
    ),
]
Calibrate = Annotated[
    bool | None,
    typer.Option(
        "--calibrate/--no-calibrate",
        help="Fit added parameters to the base, without training (default: where the base can be run).",
        rich_help_panel=ATTENTION,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.", rich_help_panel=SOURCE)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow a model that brings code of its own.", rich_help_panel=SOURCE),
]
MergeAdapter = Annotated[
    bool,
    typer.Option("--merge-adapter", help="MODEL is a PEFT adapter: merge it into its base.", rich_help_panel=SOURCE),
]
TextModel = Annotated[
    bool,
    typer.Option("--text-model", help="Convert the text model inside a model for images.", rich_help_panel=SOURCE),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.", rich_help_panel=OUTPUT)]


class Link(StrEnum):
    auto = "auto"
    hard = "hard"
    copy = "copy"


def register(app: typer.Typer) -> None:
    app.command(
        cls=Command,
        epilog=examples(
            "linearize convert HuggingFaceTB/SmolLM2-135M-Instruct --config smollm2-135m",
            "linearize convert ./llama-3.2-1b -o out --keep-softmax 18:2,17:1 --window 128",
            "linearize convert model.gguf --set mix_options.log_mass=-4 --dry-run --json",
        ),
    )(convert)
    app.command(
        cls=Command,
        epilog=examples(
            "linearize plan HuggingFaceTB/SmolLM2-135M-Instruct",
            "linearize plan ./model --keep-softmax every:4 --json",
            "linearize plan ./model --config liger",
        ),
    )(plan)


def convert(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Folder to write (default: linearized/NAME-converted).", rich_help_panel=OUTPUT
        ),
    ] = None,
    config: Config = None,
    mixer: Mixer = None,
    window: Window = None,
    sinks: Sinks = None,
    mix: Mix = None,
    keep_softmax: KeepSoftmax = None,
    softmax_window: SoftmaxWindow = None,
    calibrate: Calibrate = None,
    layers: Layers = None,
    set_: Set = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    merge_adapter: MergeAdapter = False,
    text_model: TextModel = False,
    link: Annotated[
        Link,
        typer.Option("--link", help="How base weights get there (auto: the cheapest way).", rich_help_panel=OUTPUT),
    ] = Link.auto,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the result in a fresh process.", rich_help_panel=OUTPUT)
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and print the plan; write nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json_: Json = False,
) -> None:
    """Replace softmax attention by a window and a recurrent branch; weights in, a complete checkpoint out."""
    settings = _settings(config, mixer, window, sinks, mix, keep_softmax, softmax_window, layers, set_)
    if calibrate is not None:
        when = "always" if calibrate else "never"
        settings = settings.model_copy(update={"calibration": settings.calibration.model_copy(update={"when": when})})
    if dry_run:
        from linearize.checkpoint.writing import check_target

        if out is not None:
            check_target(out, overwrite=overwrite)
        _print_plan(model, settings, json_, revision=revision, merge_adapter=merge_adapter, text_model=text_model)
        return
    from linearize.workflows.convert import convert as run

    quiet_libraries()
    student = run(
        model,
        settings,
        out=out,
        revision=revision,
        link=link,
        verify=verify,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        merge_adapter=merge_adapter,
        text_model=text_model,
        progress=note,
    )
    if json_:
        emit_json(student.to_dict())
        return
    manifest, coverage = student.manifest, student.manifest.coverage
    emit(
        f"converted {coverage.layers_converted} of {coverage.layers_planned} planned layers and "
        f"{coverage.heads_converted} of {coverage.heads_planned} planned key/value heads; "
        f"{manifest.parameters_added:,} parameters added; weights: {manifest.weights.placed}"
    )
    if (verification := manifest.verification) is not None:
        emit(
            f"verified over {verification.tokens} tokens: softmax everywhere differs from the base by "
            f"{verification.softmax_everywhere_max_difference:g}, cached decode from the full forward by "
            f"{verification.cached_decode_max_difference:.1e}"
        )
    emit(str(student.folder))


def plan(
    model: Model,
    config: Config = None,
    mixer: Mixer = None,
    window: Window = None,
    sinks: Sinks = None,
    mix: Mix = None,
    keep_softmax: KeepSoftmax = None,
    softmax_window: SoftmaxWindow = None,
    layers: Layers = None,
    set_: Set = None,
    revision: Revision = None,
    merge_adapter: MergeAdapter = False,
    text_model: TextModel = False,
    json_: Json = False,
) -> None:
    """Print what a conversion would do, from config.json and safetensors headers alone.

    Only where heads are chosen by score (recall:, text:, both:) is the base model run.
    """
    settings = _settings(config, mixer, window, sinks, mix, keep_softmax, softmax_window, layers, set_)
    _print_plan(model, settings, json_, revision=revision, merge_adapter=merge_adapter, text_model=text_model)


def _settings(config, mixer, window, sinks, mix, keep_softmax, softmax_window, layers, sets) -> Any:
    from linearize.settings.loading import load_config

    flags = {"mixer": mixer, "window": window, "sinks": sinks, "mix": mix, "keep_softmax": keep_softmax}
    flags |= {"softmax_window": softmax_window, "convert_layers": layers}
    return load_config(config, flags, sets)


def _print_plan(model: str, settings: Any, json_: bool, **source_options: Any) -> None:
    from linearize.checkpoint.open import open_source
    from linearize.conversion.inspection import inspect_source

    quiet_libraries()
    with open_source(model, dtype=settings.dtype, **source_options) as source:
        shown = inspect_source(source, settings, progress=note).to_dict()
    if json_:
        emit_json(shown)
        return
    coverage = shown["coverage"]
    emit(
        f"{shown['model']} ({shown['family']}): {coverage['heads_planned']} of {coverage['heads']} key/value heads in "
        f"{coverage['layers_planned']} of {coverage['layers']} layers become linear"
    )
    if shown["experimental"]:
        emit(f"{shown['family']} is experimental: {shown['experimental']}")
    if shown["from_config_alone"]:
        emit("no weights here: planned from config.json alone")
    emit("layer  softmax heads  linear heads")
    for layer in shown["layers"]:
        if layer["native"]:
            window = layer["sliding_window"]
            why = "not among the layers to convert" if window is None else f"sliding window of its own, {window}"
            emit(f"{layer['layer']:5}  {'all':13}  {'-':13} unchanged: {why}")
            continue
        kept, linear = ((",".join(map(str, layer[key])) or "-") for key in ("softmax_heads", "linear_heads"))
        gate = " with learned gate" if layer["gate"] == "learned" else ""
        branch = "" if layer["mixer"] == "none" else f"{layer['mixer']}{gate} {layer['mix']}, "
        what = f"{branch}window {layer['window']} + {layer['sinks']} sinks"
        if kept != "-" and layer["softmax_window"]:
            kept += f" ({layer['softmax_window']})"
        scores = "  scores " + " ".join(f"{score:.3f}" for score in layer["scores"]) if layer["scores"] else ""
        emit(f"{layer['layer']:5}  {kept:13}  {linear:13} {what if layer['linear_heads'] else 'unchanged'}{scores}")
    emit(f"parameters: {shown['parameters_base']:,} and {shown['parameters_added']:,} added")
    for name, (count, shape) in _per_kind(shown["tensors_added"]).items():
        emit(f"  {count} x {name} {shape}")
    emit(f"recurrent state: {shown['state_bytes'] / 2**20:,.2f} MiB a sequence, whatever its length")
    for length, sizes in shown["cache_bytes"].items():
        emit(
            f"cache at {int(length) // 1024}K: {sizes['student'] / 2**20:,.1f} MiB beside the base's "
            f"{sizes['base'] / 2**20:,.1f} MiB (ratio {sizes['student'] / sizes['base']:.3f})"
        )
    emit(
        f"disk: {shown['disk_bytes_linking'] / 2**20:,.2f} MiB linking, {shown['disk_bytes_copying'] / 2**20:,.1f} MiB copying; "
        f"memory: at least {shown['least_memory_bytes'] / 2**20:,.0f} MiB"
    )


def _per_kind(tensors: dict[str, list[int]]) -> dict[str, tuple[int, list[int]]]:
    """Added tensors by what they are, without the layer: name -> how many, shape of the first."""
    from linearize.checkpoint.names import ADDED

    kinds: dict[str, tuple[int, list[int]]] = {}
    for name, shape in tensors.items():
        kind = name.rpartition(ADDED)[2]
        count, first = kinds.get(kind, (0, shape))
        kinds[kind] = (count + 1, first)
    return kinds
