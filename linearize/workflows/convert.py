"""Convert a base checkpoint into a linearized checkpoint, with every head accounted for.

1. Open the source and refuse a model that cannot be converted.
2. Begin a hidden folder beside the target. The base's weights are linked or copied into it in the background.
3. Plan every layer and head, and check the base's tensors against its family (linearize/conversion/inspection.py). By
   default the base is run to find the heads that have to keep softmax (linearize/conversion/automatic.py).
4. Calibrate the added parameters (linearize/conversion/calibrate.py).
5. Count the student's linear heads, which must be those of the plan.
6. Write everything but the base's weights (linearize/conversion/student_files.py does 5 and 6).
7. Verify the folder in a fresh process (linearize/conversion/verify.py).
8. Rename the folder to the target.

Memory does not grow with the model: where the base is run, its layers are read one after another, and the weights of a
GGUF file are dequantised tensor by tensor.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.auto import TOKENIZER_CONFIG, trusting_code
from linearize.checkpoint.base import base_config, untied_head
from linearize.checkpoint.json_file import read_object
from linearize.checkpoint.manifest import Manifest
from linearize.checkpoint.names import GENERATION_CONFIG, MANIFEST
from linearize.checkpoint.open import open_source
from linearize.checkpoint.output_folder import atomic_folder, check_target
from linearize.checkpoint.outputs import OUTPUT_ROOT, default_output
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import Student
from linearize.checkpoint.weights import Weights, read_weights
from linearize.checkpoint.writing import check_space, place_in_background, write_json
from linearize.conversion.inspection import Inspection, inspect_source
from linearize.errors import CheckpointError, ConfigError, CoverageError
from linearize.families.registry import find_family
from linearize.progress import doing
from linearize.settings.config import ConversionConfig
from linearize.settings.loading import load_config

if TYPE_CHECKING:
    from linearize.conversion.calibrate import Calibration

# receives one line of text at a time
Progress = Callable[[str], None]


def convert(
    model: str | Path,
    config: ConversionConfig | str | Path | None = None,
    *,
    out: str | Path | None = None,
    revision: str | None = None,
    link: str = "auto",
    verify: bool = True,
    measure: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
    text_model: bool = False,
    ignore_unexpected: bool = False,
    progress: Progress = print,
) -> Student:
    """Convert a pretrained model into a linear-time one, and write it as a checkpoint that transformers loads.

    Args:
        model: hub id, folder of safetensors, or .gguf file of the base model.
        config: name of a packaged config (`linearize list configs`), YAML file, or `ConversionConfig`; None: defaults.
        out: folder to write; by default linearized/NAME-converted under the current folder.
        revision: branch, tag or commit of a hub model.
        link: "hard" links the base's weight files, "copy" copies them, "auto" takes the cheapest way that works.
        verify: check the result in a fresh process before it appears at `out`.
        measure: measure what the conversion loses, even if its heads are chosen by hand. With `keep_softmax: auto` it
            is measured in any case.
        overwrite: replace a checkpoint at `out`.
        trust_remote_code: run the code that a tokenizer brings. Code of models is never run.
        merge_adapter: `model` is a PEFT adapter; merge it into its base model first.
        text_model: convert the text model inside a model for images or sound.
        ignore_unexpected: keep tensors that the model has no place for, unused, instead of refusing them.
        progress: receives one line of text at a time.

    Returns:
        The written checkpoint: its folder, and its manifest with coverage, added parameters and verification.

    Raises:
        LinearizeError: every foreseen failure, with its exit code. Nothing is left at `out`.

    Example:
        >>> import linearize
        >>> config = linearize.ConversionConfig(window=64, keep_softmax="none")
        >>> student = linearize.convert("my-model", config, out="my-student")
        >>> student.kind
        'converted'
    """
    settings = config if isinstance(config, ConversionConfig) else load_config(None if config is None else str(config))
    target, reads = None if out is None else Path(out), _local_inputs(str(model), settings, config)
    if target is not None:
        check_target(target, overwrite=overwrite, reads=reads)
    opened = open_source(
        str(model), revision=revision, dtype=settings.dtype, merge_adapter=merge_adapter, text_model=text_model,
        ignore_unexpected=ignore_unexpected, near=(target or OUTPUT_ROOT).parent,
    )  # fmt: skip
    with trusting_code(trust_remote_code), opened as source:
        weights = _check_source(source, settings, progress)
        target = target or default_output(source.name, "converted")
        check_target(target, overwrite=overwrite, reads=reads)
        if link == "copy":
            check_space(target.parent, weights.nbytes)
        with (
            atomic_folder(target, overwrite=overwrite, reads=reads) as folder,
            # in the background, while torch and transformers are imported
            place_in_background(
                {weights.folder / name: folder / name for name in weights.files}, link
            ) as wait_for_weights,
        ):
            from linearize.conversion.student_files import write_student_files

            inspection = inspect_source(source, settings, weights, progress, converting=True)
            _check_plan(inspection, progress)
            calibration = _calibrate(inspection, progress)
            quality = _quality(inspection, calibration, measure, progress)
            manifest = write_student_files(folder, inspection, calibration, quality, wait_for_weights)
            if verify:
                manifest = _verify(folder, source, manifest, progress)
    return Student(target.resolve(), manifest)


def _local_inputs(model: str, settings: ConversionConfig, config: Any) -> list[Path]:
    """Return the files and folders on this machine that a conversion reads, as far as they are named."""
    named = [model, settings.scoring.text, settings.calibration.text, *([] if config is None else [config])]
    paths = [Path(name).expanduser() for name in named if isinstance(name, str | Path)]
    return [path for path in paths if path.exists()]


def _check_source(source: Source, settings: ConversionConfig, progress: Progress) -> Weights:
    """Refuse a model that cannot be converted, and return the base's tensors (step 1)."""
    if source.kind == "gguf":
        progress(f"{source.name}: GGUF weights dequantised to {settings.dtype}; this is the base from here on")
    if source.read_config().get("auto_map"):
        progress(f"{source.name} brings modelling code of its own, which is not run")
    base_config(source)
    for name in (GENERATION_CONFIG, TOKENIZER_CONFIG):
        if (source.folder / name).is_file():
            read_object(source.folder / name)
    return read_weights(source.folder)


def _check_plan(inspection: Inspection, progress: Progress) -> None:
    """Refuse a plan without linear heads, unless `keep_softmax` asks for one, and report any other (step 3)."""
    name, coverage, plan = inspection.source.name, inspection.coverage(), inspection.plan
    if experimental := find_family(plan.base_model_type).experimental:
        progress(f"{name}: {plan.base_model_type} is experimental: {experimental}")
    if (head := untied_head(inspection.source, inspection.config, inspection.weights)) is not None:
        progress(f"{name}: '{head}' differs from the embedding that config.json ties it to; it is kept as it is")
    if inspection.ignored:
        progress(f"{name}: {len(inspection.ignored)} tensors are kept unused, first '{inspection.ignored[0]}'")
    if coverage["heads_planned"] == 0 and inspection.settings.keep_softmax != "all":
        advice = ""
        if all(layer.native for layer in plan.layers):
            advice = "; every layer has a sliding window of its own, --layers all converts them"
        raise CoverageError(f"nothing to convert: the plan leaves every head as it is{advice}")
    progress(
        f"{name}: {coverage['layers_planned']} of {coverage['layers']} layers, "
        f"{coverage['heads_planned']} of {coverage['heads']} key/value heads become linear"
    )


def _calibrate(inspection: Inspection, progress: Progress) -> "Calibration | None":
    """Calibrate the added parameters (step 4); None if the settings or the text do not allow it.

    Raises:
        ConfigError: the settings insist on a calibration that the text does not allow.
    """
    settings, choice = inspection.settings.calibration, inspection.choice
    if choice is not None and choice.calibration is not None:
        return choice.calibration
    if not inspection.calibrates:
        if settings.when == "always":
            progress("not calibrated: this conversion adds no parameters")
        return None
    from linearize.conversion.calibrate import calibrate
    from linearize.data.text_rows import text_rows

    rows = text_rows(inspection.source, inspection.plan.longest_window(), settings.text, settings.rows)
    if rows is not None:
        part = None if choice is None else choice.part
        return calibrate(inspection.source, inspection.plan, rows, settings.text, progress, part)
    if settings.when == "auto":
        progress(
            "not calibrated: there is no tokenizer, or rows of text in the model's positions do not leave the window"
        )
        return None
    raise ConfigError(
        "calibration: rows of text in the model's positions do not leave the window; use a smaller --window"
    )


def _quality(
    inspection: Inspection, calibration: "Calibration | None", measure: bool, progress: Progress
) -> dict[str, Any] | None:
    """Return the record of what the conversion loses; None if that is not measured."""
    if inspection.choice is not None:
        return inspection.choice.quality
    if not measure:
        return None
    from linearize.conversion.trials import examine

    progress(f"{inspection.source.name}: measuring what the conversion loses")
    return examine(
        inspection.source,
        inspection.config,
        inspection.settings,
        inspection.plan,
        None if calibration is None else calibration.tensors,
        inspection.number_bytes,
    )


def _verify(folder: Path, source: Source, manifest: Manifest, progress: Progress) -> Manifest:
    """Verify the written folder, and add the outcome to its manifest (step 7)."""
    progress("verifying in a fresh process: softmax everywhere = base, cached = uncached")
    with doing("verifying in a fresh process"):
        document = {**manifest.to_dict(), "verification": run_verification(folder, source.folder)}
    write_json(folder / MANIFEST, document)
    return Manifest.from_document(document)


def run_verification(folder: Path, base: Path) -> dict[str, Any]:
    """Run `python -m linearize.conversion.verify` on a written folder and return its JSON.

    Raises:
        CheckpointError: the verification failed, or could not run.
    """
    # neither the current folder nor what PYTHONPATH names relative to it may bring modules of its own (-P, cwd)
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    paths = [str(Path(__file__).parents[2]), *given]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "linearize.conversion.verify", str(folder.resolve()), str(base.resolve())]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    try:
        outcome = json.loads(run.stdout)
    except ValueError:
        tail = " | ".join(run.stderr.strip().splitlines()[-3:])
        raise CheckpointError(f"verification could not run (exit code {run.returncode}): {tail}") from None
    if "failure" in outcome:
        raise CheckpointError(f"verification failed: {outcome['failure']}")
    return outcome
