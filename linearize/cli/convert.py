"""`linearize convert`."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli import conversion_options as options
from linearize.cli.help import Command, examples
from linearize.cli.options import ATTENTION, OUTPUT, Json, Overwrite
from linearize.cli.output import emit, emit_json, note, open_files
from linearize.cli.plan import print_plan

# exit code of a conversion that loses more than --quality allows, as of an evaluation whose gates fail
QUALITY_MISSED = 3

if TYPE_CHECKING:
    from linearize.checkpoint.manifest import QualityRecord
    from linearize.checkpoint.student import Student
    from linearize.settings.config import ConversionConfig


class Link(StrEnum):
    """The choices of --link."""

    auto = "auto"
    hard = "hard"
    copy = "copy"


Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Write this folder (default: linearized/NAME-converted).", rich_help_panel=OUTPUT),
]
Calibrate = Annotated[
    bool | None,
    typer.Option(
        "--calibrate/--no-calibrate",
        help="Fit the added parameters to the base, without training (default: if there is text for it).",
        rich_help_panel=ATTENTION,
    ),
]
LinkWeights = Annotated[
    Link,
    typer.Option(
        "--link",
        help="Place the base's weights by hard links or copies (auto: the cheapest way).",
        rich_help_panel=OUTPUT,
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check the result in a fresh process.", rich_help_panel=OUTPUT)
]
RequireQuality = Annotated[
    bool,
    typer.Option(
        "--require-quality",
        help="End with exit code 3 if the result does not hold what --quality asks for.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Validate and print the plan, and write nothing.", rich_help_panel=OUTPUT),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=Command,
        epilog=examples(
            "linearize convert HuggingFaceTB/SmolLM2-135M-Instruct --config smollm2-135m",
            "linearize convert ./llama-3.2-1b -o out --keep-softmax 18:2,17:1 --window 128",
            "linearize convert model.gguf --set mix_options.log_mass=-4 --dry-run --json",
        ),
    )(convert)


def convert(
    model: options.Model,
    out: Out = None,
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
    calibrate: Calibrate = None,
    layers: options.Layers = None,
    set_: options.Set = None,
    revision: options.Revision = None,
    merge_adapter: options.MergeAdapter = False,
    text_model: options.TextModel = False,
    ignore_unexpected: options.IgnoreUnexpected = False,
    link: LinkWeights = Link.auto,
    verify: Verify = True,
    require_quality: RequireQuality = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> int:
    """Replace full softmax attention by a softmax window and a recurrent branch, and write a complete checkpoint."""
    settings = options.load_settings(
        config, set_, mixer=mixer, window=window, sinks=sinks, mix=mix, keep_softmax=keep_softmax,
        softmax_window=softmax_window, layers=layers, quality=quality, cache_budget=cache_budget,
        budget=budget,
    )  # fmt: skip
    if calibrate is not None:  # without the flag, the config decides
        settings = _with_calibration(settings, "always" if calibrate else "never")
    source_options: dict[str, Any] = {
        "revision": revision,
        "merge_adapter": merge_adapter,
        "text_model": text_model,
        "ignore_unexpected": ignore_unexpected,
    }
    if out is not None:
        _check_out(out, overwrite, config)
    if dry_run:
        print_plan(model, settings, json_, **source_options)
        return 0
    from linearize.workflows.convert import convert as convert_model

    student = convert_model(
        model, settings, out=out, link=link, verify=verify, measure=require_quality, overwrite=overwrite,
        progress=note, **source_options,
    )  # fmt: skip
    if json_:
        emit_json(student.to_dict())
    else:
        _print_outcome(student)
    measured = student.manifest.quality
    return QUALITY_MISSED if require_quality and not (measured and measured.holds) else 0


def _check_out(out: Path, overwrite: bool, config: str | None) -> None:
    """Refuse an output that cannot be written, or that holds the config or the log of this very command."""
    from linearize.checkpoint.output_folder import check_target

    named = [Path(config)] if config else []
    check_target(out, overwrite=overwrite, reads=[*filter(Path.exists, named), *open_files()])


def _with_calibration(settings: "ConversionConfig", when: str) -> "ConversionConfig":
    """Return the settings with another `calibration.when`."""
    calibration = settings.calibration.model_copy(update={"when": when})
    return settings.model_copy(update={"calibration": calibration})


def _print_outcome(student: "Student") -> None:
    """Print what was converted, what it holds of the base, what verification found, and the next command."""
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
    sizes = (
        f"{sizes['student'] / sizes['base']:.3f} at {int(length) // 1024}K"
        for length, sizes in manifest.cache_bytes.items()
    )
    emit(
        f"softmax in {coverage.heads - coverage.heads_converted} of {coverage.heads} heads; cache beside the base's: "
        f"{', '.join(sizes)}"
    )
    if manifest.quality is not None:
        _print_quality(manifest.quality)
    emit(f"next: linearize eval {shlex.quote(str(student.folder))}")
    emit(str(student.folder))
    if manifest.quality is not None and not manifest.quality.holds:
        emit(f"lost: {'; '.join(manifest.quality.lost)}")


def _print_quality(quality: "QualityRecord") -> None:
    """Print the curve of the conversions that were measured."""
    from linearize.report.tables import quality_rows

    head, rows = quality_rows(quality)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        emit("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
