"""Write the files of a converted checkpoint, and check first that the student is what the plan says.

The files are config, added parameters, weight index, tokenizer and licence files, portable modelling file, model card
and manifest. The base's weight files are placed by linearize/checkpoint/writing.py meanwhile.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from linearize.checkpoint.assets import copy_assets
from linearize.checkpoint.auto import tokenizer_code, trusts_code
from linearize.checkpoint.base import expected_tensors
from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.checkpoint.manifest import MANIFEST_VERSION, Manifest
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.weights import INDEX, SINGLE
from linearize.checkpoint.writing import write_json, write_tensors, write_text
from linearize.conversion.calibrate import Calibration
from linearize.conversion.inspection import Inspection
from linearize.device import versions
from linearize.errors import CoverageError
from linearize.families.registry import find_family
from linearize.modeling.added import added_tensors
from linearize.modeling.export import auto_map, class_names, write_portable
from linearize.modeling.factory import linearized_classes
from linearize.plan import PREFIX
from linearize.report.card import conversion_card


def write_student_files(
    folder: Path,
    inspection: Inspection,
    calibration: Calibration | None,
    quality: dict[str, Any] | None,
    wait_for_weights: Callable[[], str],
) -> Manifest:
    """Write everything but the base's weights, and return the manifest.

    Args:
        calibration: the fitted parameters; None for their first values.
        quality: what the conversion was measured to lose; None if that was not measured.
        wait_for_weights: waits until the base's weights are in the folder. It returns the methods that placed them; see
            `place_in_background`.

    Raises:
        CoverageError: the student's heads or tensors are not those of the plan.
    """
    coverage = _check_coverage(inspection)
    source = inspection.source.folder
    copy_assets(source, folder, *(tokenizer_code(source) if trusts_code() else ()))
    write_json(folder / "config.json", _student_config(inspection))
    write_portable(folder, inspection.plan)  # the modelling code, for machines without this package
    placed = wait_for_weights()
    weight_files = _write_added_and_index(folder, inspection, calibration)
    plan = inspection.plan.to_dict()
    document = {
        "format_version": MANIFEST_VERSION,
        "kind": "converted",
        "base": inspection.source.describe(),
        "settings": inspection.settings.model_dump(),
        "plan": plan,
        "plan_fingerprint": fingerprint_of(plan),
        "coverage": coverage,
        "ignored_tensors": list(inspection.ignored),
        "parameters_added": inspection.added_parameters,
        "calibration": None if calibration is None else calibration.to_dict(),
        "quality": quality,
        # of one sequence: the recurrent states, and below the caches by length of context
        "state_bytes": inspection.state_bytes,
        "vocabulary": inspection.config["vocab_size"],
        "cache_bytes": {str(length): sizes for length, sizes in inspection.cache_bytes.items()},
        "weights": {"placed": placed, "files": weight_files, "bytes": inspection.weights.nbytes},
        # a lone model.safetensors has no index
        "sha256": {name: sha256(folder / name) for name in ("config.json", INDEX) if (folder / name).is_file()},
        "versions": versions(),
    }
    manifest = Manifest.from_document(document)
    write_text(folder / "README.md", conversion_card(manifest, inspection.source.folder))
    write_json(folder / MANIFEST, document)
    return manifest


def _check_coverage(inspection: Inspection) -> dict[str, int]:
    """Check that the student has the linear heads and the tensors of the plan. It is built without weights for that.

    Returns:
        The coverage: numbers of layers and key/value heads, in all, planned to become linear and converted.

    Raises:
        CoverageError: the heads or the tensors are not those of the plan.
    """
    classes = linearized_classes(find_family(inspection.plan.base_model_type))
    config = {**inspection.config, "linearize": inspection.plan.to_dict()}
    config.pop("model_type")
    with torch.device("meta"):
        student = classes.causal_lm(classes.config.from_dict(config))
    linear_heads = [len(attention.linear_heads) for _, attention in student.linear_attentions()]
    converted = {
        "layers_converted": sum(1 for heads in linear_heads if heads),
        "heads_converted": sum(linear_heads),
    }
    planned = inspection.coverage()
    if (planned["layers_planned"], planned["heads_planned"]) != tuple(converted.values()):
        raise CoverageError(
            f"planned {planned['layers_planned']} layers and {planned['heads_planned']} heads, converted "
            f"{converted['layers_converted']} and {converted['heads_converted']}"
        )
    # transformers renames and joins some tensors while it loads; files have the names from before that
    names = set(revert_weight_conversion(student, student.state_dict()))
    base_names, _ = expected_tensors(inspection.config, inspection.plan.base_model_type)
    expected = set(base_names) | set(inspection.added)
    if differing := names ^ expected:
        raise CoverageError(f"the student's tensors differ from base and additions, first '{min(differing)}'")
    return {**planned, **converted}


def _student_config(inspection: Inspection) -> dict[str, Any]:
    """Return the student's config.json: the base's, with the linearized architecture and the plan on top."""
    config = inspection.source.read_config()
    family = inspection.plan.base_model_type
    config.pop("auto_map", None)
    config["model_type"] = f"{PREFIX}{family}"
    config["architectures"] = [class_names(family)["causal_lm"]]
    config["auto_map"] = auto_map(family)
    config["linearize"] = inspection.plan.to_dict()
    return config


def _write_added_and_index(folder: Path, inspection: Inspection, calibration: Calibration | None) -> list[str]:
    """Write the added parameters and the index beside the base's weight files; return the names of all weight files."""
    weights = inspection.weights
    renamed = {name: name for name in weights.files}  # name in the student's folder by name in the base's
    if weights.files == (SINGLE,) and inspection.added:
        # readers take a lone model.safetensors for the whole model, so beside a second file it needs a shard's name
        renamed[SINGLE] = "model-00001-of-00002.safetensors"
        (folder / SINGLE).rename(folder / renamed[SINGLE])
    weight_map = {name: renamed[info.file] for name, info in weights.tensors.items()}
    files = list(renamed.values())
    if inspection.added:
        added_file = "model-00002-of-00002.safetensors" if renamed.get(SINGLE) else "model-mixer.safetensors"
        while added_file in files:  # of a base that has a shard of that name
            added_file = f"added-{added_file}"
        _write_added(folder / added_file, inspection, calibration)
        weight_map |= dict.fromkeys(inspection.added, added_file)
        files.append(added_file)
    if files != [SINGLE]:
        metadata = {
            "total_parameters": inspection.base_parameters + inspection.added_parameters,
            # bytes; added parameters are float32
            "total_size": sum(info.nbytes for info in weights.tensors.values()) + 4 * inspection.added_parameters,
        }
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return files


def _write_added(path: Path, inspection: Inspection, calibration: Calibration | None) -> None:
    """Write the added parameters: as calibrated, or at their first values."""
    tensors = added_tensors(inspection.config, inspection.plan, device="cpu")
    if calibration is not None:
        assert calibration.tensors.keys() == tensors.keys()
        tensors = calibration.tensors
    write_tensors(path, tensors)
