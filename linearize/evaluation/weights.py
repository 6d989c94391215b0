"""Decide which sets of weights an evaluation needs, how each is loaded, and if all fit into memory at once."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from linearize import device as devices
from linearize.checkpoint.auto import auto_tokenizer
from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import Student
from linearize.checkpoint.weights import read_weights
from linearize.conversion.calibrate import calibrate
from linearize.conversion.keep_softmax import spread_evenly
from linearize.data.text_rows import text_rows
from linearize.errors import ConfigError
from linearize.evaluation.context import REFERENCE
from linearize.evaluation.suite import Suite
from linearize.families.registry import find_family
from linearize.modeling import loading
from linearize.plan import Plan
from linearize.report.results import CONTROL, STUDENT, UNIFORM

# memory for activations, as a factor on that of the weights
HEADROOM = 1.25
Loaders = dict[str, Callable[[], PreTrainedModel]]


def weight_loaders(
    student: Student, source: Source, suite: Suite, dtype: torch.dtype
) -> tuple[Loaders, dict[str, Path]]:
    """Return a function that loads each set of weights, and the folder that each comes from.

    Raises:
        ConfigError: the control is no control of this student, or no softmax heads can be spread.
    """
    plan = student.manifest.plan
    loaders: Loaders = {
        REFERENCE: lambda: loading.load_unconverted(
            source, plan, dtype=dtype, added=loading.untrained_parameters(student)
        ),
        STUDENT: lambda: _load_comparable(student.folder, source, dtype, "the student"),
    }
    folders = {REFERENCE: source.folder, STUDENT: student.weights_folder}
    if suite.uniform:
        uniform = spread_softmax_heads(plan, student.manifest.coverage.heads_per_layer)
        loaders[UNIFORM] = lambda: loading.load_unconverted(
            source, uniform, dtype=dtype, added=_calibrated_parameters(source, uniform, student)
        )
        folders[UNIFORM] = source.folder
    if suite.control is not None:
        control = _read_control(suite.control, student)
        loaders[CONTROL] = lambda: _load_comparable(control.folder, source, dtype, "the control")
        folders[CONTROL] = control.weights_folder
    return loaders, folders


def _read_control(folder: str, student: Student) -> Student:
    """Read a control, the base with the student's recipe, and refuse another checkpoint."""
    control = Student.read(folder)
    if control.manifest.base.fingerprint != student.manifest.base.fingerprint:
        raise ConfigError(
            f"--control: {control.folder} comes from another base ({control.manifest.base.name}) than the student"
        )
    if linear_heads := control.manifest.coverage.heads_converted:
        raise ConfigError(
            f"--control: {control.folder} has {linear_heads} linear heads; a control is the base with the student's "
            "recipe (`linearize convert --keep-softmax all`, then `linearize finetune`)"
        )
    return control


def spread_softmax_heads(plan: Plan, heads: int) -> Plan:
    """Return a plan with the same number of softmax heads, at even distances.

    Args:
        heads: key/value heads of a layer. Layers that stay the base's own take no part.

    Raises:
        ConfigError: the plan has no softmax heads, or no others.
    """
    converted = [i for i, layer in enumerate(plan.layers) if not layer.native]
    count = sum(len(plan.layers[i].softmax_heads) for i in converted)
    if count in (0, len(converted) * heads):
        raise ConfigError("--uniform: the student keeps none or all of its heads softmax; there is nothing to spread")
    layers = list(plan.layers)
    for i, softmax_heads in zip(converted, spread_evenly(count, len(converted), heads)):
        layers[i] = layers[i].with_softmax_heads(softmax_heads)
    return replace(plan, layers=tuple(layers))


def _calibrated_parameters(source: Source, plan: Plan, student: Student) -> dict[str, torch.Tensor] | None:
    """Calibrate the added parameters of another plan as the student's were; None if they were not."""
    settings = student.manifest.settings.calibration
    if student.manifest.calibration is None or settings is None:
        return None
    rows = text_rows(source, plan.longest_window(), settings.text, settings.rows)
    assert rows is not None, "the student was calibrated on these rows, and its windows are as long"
    return calibrate(source, plan, rows, settings.text).tensors


def _load_comparable(folder: Path, source: Source, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """Load a checkpoint, and refuse one whose vocabulary has another size than the base's.

    Args:
        source: the base.
        name: words for the checkpoint in the error.

    Raises:
        ConfigError: the sizes differ.
    """
    model = loading.load_student(folder, dtype=dtype)
    base_size, size = source.read_config()["vocab_size"], model.config.vocab_size
    if size != base_size:
        raise ConfigError(
            f"--base: its vocabulary has {base_size} tokens, that of {name} {size}; their figures cannot be compared"
        )
    return model


def require_same_shape(source: Source, student: Student) -> None:
    """Refuse a base whose attention has another shape than the student's: a plan names heads, and parameters fit them.

    Raises:
        ConfigError: hidden size, number of heads or head dimension differ.
    """
    student_config = student.read_config()
    family = find_family(student_config["linearize"]["base_model_type"])
    base_config = source.read_config()
    base_shape = {**base_config, **family.heads(base_config)}
    student_shape = {**student_config, **family.heads(student_config)}
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if base_shape.get(key) != student_shape.get(key):
            raise ConfigError(
                f"--base: {source.name} has {key} {base_shape.get(key)}, the student's base had "
                f"{student_shape.get(key)}; their figures cannot be compared"
            )


def require_same_tokenizer(source: Source, tokenizer: Any) -> None:
    """Refuse a base with another tokenizer: numbers per token cannot be compared if two models split text differently.

    Raises:
        ConfigError: the vocabularies differ.
    """
    if not any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    base_tokenizer = auto_tokenizer(source.folder)
    differing = dict(base_tokenizer.get_vocab().items() ^ tokenizer.get_vocab().items())
    if differing:
        raise ConfigError(
            f"--base: its tokenizer differs from the student's in {len(differing)} entries, first "
            f"{min(differing)!r}; their figures cannot be compared"
        )


def fits_in_memory(folders: dict[str, Path], dtype: torch.dtype, device: str) -> bool:
    """Return True if all sets of weights and their activations fit into memory at once."""
    parameters = sum(
        math.prod(info.shape) for folder in folders.values() for info in read_weights(folder).tensors.values()
    )
    return parameters * dtype.itemsize * HEADROOM <= devices.available_memory(device)


def weights_fingerprint(student: Student) -> str:
    """Return a digest of a student's manifest and of the names, sizes and times of its weights.

    The weights of an adapter alone include its parent's.
    """
    files = [path for folder in {student.folder, student.weights_folder} for path in folder.rglob("*.safetensors")]
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(files)]
    return sha256([(student.folder / MANIFEST).read_bytes(), *(line.encode() for line in stats)])
