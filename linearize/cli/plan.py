"""`linearize plan`, and the text of a plan."""

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from linearize.cli import conversion_options as options
from linearize.cli.help import Command, examples
from linearize.cli.options import Json
from linearize.cli.output import emit, emit_json, note

if TYPE_CHECKING:
    from linearize.settings.config import ConversionConfig

MIB = 2**20


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=Command,
        epilog=examples(
            "linearize plan HuggingFaceTB/SmolLM2-135M-Instruct",
            "linearize plan ./model --keep-softmax every:4 --json",
            "linearize plan ./model --config liger",
        ),
    )(plan)


def plan(
    model: options.Model,
    config: options.Config = None,
    mixer: options.Mixer = None,
    window: options.Window = None,
    sinks: options.Sinks = None,
    mix: options.Mix = None,
    keep_softmax: options.KeepSoftmax = None,
    quality: options.Quality = None,
    cache_budget: options.CacheBudget = None,
    budget: options.Budget = None,
    softmax_window: options.SoftmaxWindow = None,
    layers: options.Layers = None,
    set_: options.Set = None,
    revision: options.Revision = None,
    merge_adapter: options.MergeAdapter = False,
    text_model: options.TextModel = False,
    ignore_unexpected: options.IgnoreUnexpected = False,
    json_: Json = False,
) -> None:
    """Print the plan of a conversion, from config.json and safetensors headers.

    One layer with random weights is timed. Only choosing heads by score (recall:, text:, both:) runs the base model.
    """
    settings = options.load_settings(
        config, set_, mixer=mixer, window=window, sinks=sinks, mix=mix, keep_softmax=keep_softmax,
        softmax_window=softmax_window, layers=layers, quality=quality, cache_budget=cache_budget,
        budget=budget,
    )  # fmt: skip
    print_plan(
        model,
        settings,
        json_,
        revision=revision,
        merge_adapter=merge_adapter,
        text_model=text_model,
        ignore_unexpected=ignore_unexpected,
    )


def print_plan(model: str, settings: "ConversionConfig", json_: bool, **source_options: Any) -> None:
    """Inspect `model` and print the plan of its conversion, as JSON or as text.

    Args:
        source_options: further arguments of `open_source`.
    """
    from linearize.checkpoint.open import open_source
    from linearize.conversion.inspection import inspect_source

    with open_source(model, dtype=settings.dtype, **source_options) as source:
        inspection = inspect_source(source, settings, progress=note)
        from linearize.conversion.estimate import estimate_plan

        takes = estimate_plan(inspection)
        planned = replace(inspection, estimate=None if takes is None else takes.to_dict()).to_dict()
    if json_:
        emit_json(planned)
        return
    for line in plan_lines(planned):
        emit(line)


def plan_lines(planned: dict[str, Any]) -> list[str]:
    """Render the plan that `linearize plan --json` prints as lines of text: heads by layer, then sizes."""
    family, coverage, possible = planned["family"], planned["coverage"], planned["choice"]["possible"]
    linear = (
        "how many stay softmax, convert finds out by measured loss"
        if possible
        else f"{coverage['heads_planned']} of {coverage['heads']} key/value heads in {coverage['layers_planned']} of "
        f"{coverage['layers']} layers become linear"
    )
    lines = [f"{planned['model']} ({family}): {linear}"]
    if planned["experimental"]:
        lines.append(f"{family} is experimental: {planned['experimental']}")
    if planned["from_config_alone"]:
        lines.append("no weights here: planned from config.json alone")
    lines += (
        _possible_lines(planned) if possible else ["layer    softmax heads  linear heads", *_folded(planned["layers"])]
    )
    lines.append(f"parameters: {planned['parameters_base']:,} and {planned['parameters_added']:,} added")
    lines += [f"  {count} x {name} {shape}" for name, (count, shape) in _by_kind(planned["tensors_added"]).items()]
    lines.append(f"recurrent state: {planned['state_bytes'] / MIB:,.2f} MiB a sequence, whatever its length")
    for length, sizes in planned["cache_bytes"].items() if not possible else ():
        student, base = sizes["student"], sizes["base"]
        lines.append(
            f"cache at {int(length) // 1024}K: {student / MIB:,.1f} MiB beside the base's {base / MIB:,.1f} MiB "
            f"(ratio {student / base:.3f})"
        )
    linking, copying = planned["disk_bytes_linking"] / MIB, planned["disk_bytes_copying"] / MIB
    lines.append(f"disk: {linking:,.2f} MiB linking, {copying:,.1f} MiB copying")
    if (takes := planned["estimate"]) is not None:
        steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in takes["steps"].items() if seconds >= 1)
        lines.append(
            f"convert takes about {takes['seconds']:.0f} s ({steps}) and {takes['memory_bytes'] / MIB:,.0f} MiB memory"
        )
    return [*lines, f"next: linearize convert {shlex.quote(planned['reference'])}"]


def _possible_lines(planned: dict[str, Any]) -> list[str]:
    """Render the shares of heads that come into question while no loss is measured, with their caches."""
    heads = planned["coverage"]["heads_planned"]
    lines = [f"softmax heads of {heads}  cache beside the base's at 4K, 32K, 128K"]
    for option in planned["choice"]["possible"]:
        ratios = "  ".join(f"{share:.3f}" for share in option["cache"].values())
        lines.append(f"{option['softmax_heads']:13}  {ratios}")
    return lines


def _folded(layers: list[dict[str, Any]]) -> list[str]:
    """Render one line for every run of layers that are treated alike: 0-31."""
    runs: list[list[Any]] = []  # first layer, last layer, text
    for layer in layers:
        text = _treatment(layer)
        if runs and runs[-1][2] == text:
            runs[-1][1] = layer["layer"]
        else:
            runs.append([layer["layer"], layer["layer"], text])
    names = [str(first) if first == last else f"{first}–{last}" for first, last, _ in runs]
    return [f"{name:>7}  {text}" for name, (_, _, text) in zip(names, runs, strict=True)]


def _treatment(layer: dict[str, Any]) -> str:
    """Render softmax heads, linear heads and what becomes of these in one layer."""
    if layer["native"]:
        window = layer["sliding_window"]
        reason = "not among the layers to convert" if window is None else f"sliding window of its own, {window}"
        return f"{'all':13}  {'-':13} unchanged: {reason}"
    softmax_heads = ",".join(map(str, layer["softmax_heads"])) or "-"
    linear_heads = ",".join(map(str, layer["linear_heads"])) or "-"
    if layer["softmax_heads"] and layer["softmax_window"]:
        softmax_heads += f" ({layer['softmax_window']})"
    gate = " with learned gate" if layer["gate"] == "learned" else ""
    branch = "" if layer["mixer"] == "none" else f"{layer['mixer']}{gate} {layer['mix']}, "
    treatment = f"{branch}window {layer['window']} + {layer['sinks']} sinks" if layer["linear_heads"] else "unchanged"
    text = f"{softmax_heads:13}  {linear_heads:13} {treatment}"
    if layer["scores"]:
        text += "  scores " + " ".join(f"{score:.3f}" for score in layer["scores"])
    return text


def _by_kind(tensors: dict[str, list[int]]) -> dict[str, tuple[int, list[int]]]:
    """Group the added tensors of all layers by name; return their number and the shape of the first."""
    from linearize.checkpoint.names import ADDED

    kinds: dict[str, tuple[int, list[int]]] = {}
    for name, shape in tensors.items():
        kind = name.rpartition(ADDED)[2]
        count, first = kinds.get(kind, (0, shape))
        kinds[kind] = (count + 1, first)
    return kinds
