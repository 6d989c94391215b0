"""The conversion: a base checkpoint in, a linearized checkpoint out, every head accounted for.

1. Resolve the settings, the source and its family; refuse what cannot be converted.
2. Make the plan, layer by layer and head by head.
3. Check the base's tensors, from the safetensors headers, against what the family expects.
4. Where the base can be run, fit the added parameters to it (linearize/conversion/calibrate.py).
5. Write beside the target: base weights linked or copied, new parameters in a file of their own, index, config,
   tokenizer and licence files, the portable modelling file, the model card.
6. Verify in a fresh process.
7. Rename into place.

Only steps 2 (heads chosen by score) and 4 read weights (and a GGUF file must be dequantised), so memory does not grow with the model.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.assets import copy_assets
from linearize.checkpoint.base import base_config, expected_tensors
from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.checkpoint.manifest import MANIFEST_VERSION, Manifest
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.open import open_source
from linearize.checkpoint.outputs import default_output
from linearize.checkpoint.student import Student
from linearize.checkpoint.weights import INDEX, SINGLE, read_weights
from linearize.checkpoint.writing import atomic_folder, check_space, check_target, placing, write_json, write_text
from linearize.conversion.inspection import Inspection, inspect_source
from linearize.device import versions
from linearize.errors import CheckpointError, ConfigError, CoverageError
from linearize.families.registry import find_family
from linearize.settings.config import ConversionConfig
from linearize.settings.loading import load_config

if TYPE_CHECKING:
    from linearize.conversion.calibrate import Calibration


def convert(
    model: str | Path,
    config: ConversionConfig | str | Path | None = None,
    *,
    out: str | Path | None = None,
    revision: str | None = None,
    link: str = "auto",
    verify: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
    text_model: bool = False,
    progress: Callable[[str], None] = print,
) -> Student:
    """Convert a pretrained model into a linear-time one, and write it as a checkpoint that transformers loads.

    Args:
        model: hub id, folder of safetensors, or .gguf file of the base model.
        config: name of a packaged config (`linearize list configs`), a YAML file, or a `ConversionConfig`; None takes
            the defaults.
        out: folder to write; by default linearized/NAME-converted under the current folder.
        revision: branch, tag or commit of a hub model.
        link: placement of the base's weight files: "hard" insists on hard links, "copy" makes bytes of its own, "auto" takes
            the cheapest way the file system has.
        verify: check the result in a fresh process before it appears at `out`.
        overwrite: replace a checkpoint that stands at `out`.
        trust_remote_code: accept, without a message, a model that brings code of its own. The code is never run.
        merge_adapter: `model` is a PEFT adapter; merge it into its base model first.
        text_model: convert the text model inside a model for images or sound.
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
    model, out = str(model), None if out is None else Path(out)
    if out is not None:
        check_target(out, overwrite=overwrite)
    with open_source(
        model, revision=revision, dtype=settings.dtype, merge_adapter=merge_adapter, text_model=text_model
    ) as source:
        if source.kind == "gguf":
            progress(f"{source.name}: GGUF weights dequantised to {settings.dtype}; this is the base from here on")
        if source.read_config().get("auto_map") and not trust_remote_code:
            progress(f"{source.name} brings modelling code of its own, which is not run (--trust-remote-code)")
        base_config(source)
        weights = read_weights(source.folder)
        out = out or default_output(source.name, "converted")
        check_target(out, overwrite=overwrite)
        if link == "copy":
            check_space(out.parent, weights.nbytes)
        with (
            atomic_folder(out, overwrite=overwrite) as folder,
            # the bytes flow while torch and transformers are being imported
            placing({weights.folder / name: folder / name for name in weights.files}, link) as placed,
        ):
            inspection = inspect_source(source, settings, weights, progress, converting=True)
            if experimental := find_family(inspection.plan.base_model_type).experimental:
                progress(f"{source.name}: {inspection.plan.base_model_type} is experimental: {experimental}")
            coverage = inspection.coverage()
            if coverage["heads_planned"] == 0 and settings.keep_softmax != "all":
                raise CoverageError(
                    "nothing to convert: the plan leaves every head as it is"
                    + (
                        "; every layer has a sliding window of its own, --layers all converts them"
                        if all(layer.native for layer in inspection.plan.layers)
                        else ""
                    )
                )
            progress(
                f"{source.name}: {coverage['layers_planned']} of {coverage['layers']} layers, "
                f"{coverage['heads_planned']} of {coverage['heads']} key/value heads become linear"
            )
            manifest = write_checkpoint(folder, inspection, placed, _calibration(inspection, progress))
            if verify:
                progress("verifying in a fresh process: softmax everywhere = base, cached = uncached")
                verification = run_verification(folder, source.folder)
                manifest = Manifest.from_document({**manifest.to_dict(), "verification": verification})
            write_json(folder / MANIFEST, manifest.to_dict())
    return Student(out.resolve(), manifest)


def _calibration(inspection: Inspection, progress: Callable[[str], None]) -> "Calibration | None":
    """Step 4; None where the settings or the machine say no."""
    settings = inspection.settings.calibration
    if not inspection.calibrates:
        if inspection.added and settings.when == "auto":
            progress("not calibrated: the base is too large to be run here (--calibrate insists)")
        if settings.when == "always":
            progress("not calibrated: this conversion adds no parameters")
        return None
    from linearize.conversion.calibrate import calibrate
    from linearize.data.text_rows import text_rows

    rows = text_rows(inspection.source, inspection.plan.longest_window(), settings.text, settings.rows)
    if rows is None and settings.when == "auto":
        progress(
            "not calibrated: there is no tokenizer, or rows of text in the model's positions do not leave the window"
        )
        return None
    if rows is None:
        raise ConfigError(
            "calibration: rows of text in the model's positions do not leave the window; use a smaller --window"
        )
    return calibrate(inspection.source, inspection.plan, rows, settings.text, progress)


def write_checkpoint(
    folder: Path, inspection: Inspection, placed: Callable[[], str], calibration: "Calibration | None" = None
) -> Manifest:
    """Step 5, the base's shards being on their way. Returns the content of linearize.json."""
    from linearize.modeling.export import write_portable
    from linearize.report.card import conversion_card

    converted = _assert_coverage(inspection)
    copy_assets(inspection.source.folder, folder)
    config = student_config(inspection)
    write_json(folder / "config.json", config)
    write_portable(folder, inspection.plan)
    how = placed()
    shard_names = _complete_weights(folder, inspection, calibration)
    document = {
        "format_version": MANIFEST_VERSION,
        "kind": "converted",
        "base": inspection.source.describe(),
        "settings": inspection.settings.model_dump(),
        "plan": inspection.plan.to_dict(),
        "plan_fingerprint": fingerprint_of(inspection.plan.to_dict()),
        "coverage": {**inspection.coverage(), **converted},
        "ignored_tensors": list(inspection.ignored),
        "parameters_added": inspection.added_parameters,
        "calibration": None if calibration is None else calibration.to_dict(),
        "state_bytes": inspection.state_bytes,
        "vocabulary": inspection.config["vocab_size"],
        "cache_bytes": {str(length): sizes for length, sizes in inspection.cache_bytes.items()},
        "weights": {"placed": how, "files": shard_names, "bytes": inspection.weights.nbytes},
        "sha256": {name: sha256(folder / name) for name in ("config.json", INDEX) if (folder / name).is_file()},
        "versions": versions(),
    }
    manifest = Manifest.from_document(document)
    write_text(folder / "README.md", conversion_card(manifest, inspection.source.folder))
    write_json(folder / MANIFEST, document)
    return manifest


def student_config(inspection: Inspection) -> dict[str, Any]:
    """The base's config.json, word for word, with the linearized architecture and the plan on top."""
    from linearize.modeling.export import auto_map, class_names

    config = inspection.source.read_config()
    family = inspection.plan.base_model_type
    config.pop("auto_map", None)
    config["model_type"] = f"linearized_{family}"
    config["architectures"] = [class_names(family)["causal_lm"]]
    config["auto_map"] = auto_map(family)
    config["linearize"] = inspection.plan.to_dict()
    return config


def _complete_weights(folder: Path, inspection: Inspection, calibration: "Calibration | None") -> list[str]:
    """Writes the added parameters and the index beside the base's shards; returns all weight files."""
    weights = inspection.weights
    names = dict.fromkeys(weights.files)
    if weights.files == (SINGLE,) and inspection.added:
        # readers take a lone model.safetensors for the whole model, so beside a second file it needs a shard's name
        names = {SINGLE: "model-00001-of-00002.safetensors"}
        (folder / SINGLE).rename(folder / names[SINGLE])
    weight_map = {name: names[info.file] or info.file for name, info in weights.tensors.items()}
    files = [new or old for old, new in names.items()]
    if inspection.added:
        added_file = "model-00002-of-00002.safetensors" if len(files) == 1 else "model-mixer.safetensors"
        _write_added(folder / added_file, inspection, calibration)
        weight_map.update(dict.fromkeys(inspection.added, added_file))
        files.append(added_file)
    if files != [SINGLE]:
        total = sum(info.nbytes for info in weights.tensors.values()) + 4 * inspection.added_parameters
        parameters = inspection.base_parameters + inspection.added_parameters
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return files


def _write_added(path: Path, inspection: Inspection, calibration: "Calibration | None") -> None:
    from safetensors.torch import save_file

    from linearize.modeling.added import added_tensors

    tensors = added_tensors(inspection.config, inspection.plan, device="cpu")
    if calibration is not None:
        assert calibration.tensors.keys() == tensors.keys()
        tensors = calibration.tensors
    save_file(tensors, path, metadata={"format": "pt"})


def _assert_coverage(inspection: Inspection) -> dict[str, int]:
    """Builds the student without weights and counts what became linear; it must be exactly what was planned."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from linearize.modeling.factory import linearized_classes

    classes = linearized_classes(find_family(inspection.plan.base_model_type))
    config = {**inspection.config, "linearize": inspection.plan.to_dict()}
    config.pop("model_type")
    with torch.device("meta"):
        student = classes.causal_lm(classes.config.from_dict(config))
    attentions = [module for _, module in student.linear_attentions()]
    converted = {
        "layers_converted": sum(1 for module in attentions if module.linear_heads),
        "heads_converted": sum(len(module.linear_heads) for module in attentions),
    }
    planned = inspection.coverage()
    if (planned["layers_planned"], planned["heads_planned"]) != tuple(converted.values()):
        raise CoverageError(
            f"planned {planned['layers_planned']} layers and {planned['heads_planned']} heads, converted "
            f"{converted['layers_converted']} and {converted['heads_converted']}"
        )
    names = set(revert_weight_conversion(student, student.state_dict()))
    base_names, _ = expected_tensors(inspection.config, inspection.plan.base_model_type)
    if names != set(base_names) | set(inspection.added):
        odd = sorted(names ^ (set(base_names) | set(inspection.added)))
        raise CoverageError(f"the student's tensors differ from base and additions, first '{odd[0]}'")
    return converted


def run_verification(folder: Path, base: Path) -> dict[str, Any]:
    """Step 6: `python -m linearize.conversion.verify` on the written folder; its JSON, or an error that says what differs."""
    command = [sys.executable, "-m", "linearize.conversion.verify", str(folder), str(base)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        result = json.loads(run.stdout)
    except ValueError:
        tail = " | ".join(run.stderr.strip().splitlines()[-3:])
        raise CheckpointError(f"verification could not run (exit code {run.returncode}): {tail}") from None
    if "failure" in result:
        raise CheckpointError(f"verification failed: {result['failure']}")
    return result
