"""Decide which sets of weights an evaluation needs, how each is loaded, and whether all fit into memory at once."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import Student
from linearize.conversion.keep_softmax import spread_evenly
from linearize.errors import ConfigError
from linearize.evaluation.suite import Suite
from linearize.plan import Plan
from linearize.report.results import CONTROL, STUDENT, UNIFORM

# what computing takes beside the weights
HEADROOM = 1.25


def weight_loaders(
    student: Student, source: Source, suite: Suite, dtype
) -> tuple[dict[str, Callable], dict[str, Path]]:
    """The sets of weights of an evaluation: functions that load them, and the folders they come from."""
    from linearize.evaluation.lab import REFERENCE
    from linearize.modeling.loading import load_student, load_unconverted, untrained_parameters

    plan = student.manifest.plan
    vocabulary = source.read_config()["vocab_size"]
    loaders: dict[str, Callable] = {
        REFERENCE: lambda: load_unconverted(source, plan, dtype=dtype, added=untrained_parameters(student)),
        STUDENT: lambda: _same_vocabulary(load_student(student.folder, dtype=dtype), vocabulary, "the student"),
    }
    folders = {REFERENCE: source.folder, STUDENT: student.weights_folder}
    if suite.uniform:
        uniform = spread_softmax_heads(plan, student.manifest.coverage.heads_per_layer)
        loaders[UNIFORM] = lambda: load_unconverted(
            source, uniform, dtype=dtype, added=_calibrated(source, uniform, student)
        )
        folders[UNIFORM] = source.folder
    if suite.control is not None:
        control = Student.read(suite.control)
        if control.manifest.base.fingerprint != student.manifest.base.fingerprint:
            raise ConfigError(
                f"--control: {control.folder} comes from another base ({control.manifest.base.name}) than the student"
            )
        if linear_heads := control.manifest.coverage.heads_converted:
            raise ConfigError(
                f"--control: {control.folder} has {linear_heads} linear heads; a control is the base "
                "with the student's recipe (`linearize convert --keep-softmax all`, then `linearize finetune`)"
            )
        loaders[CONTROL] = lambda: _same_vocabulary(
            load_student(control.folder, dtype=dtype), vocabulary, "the control"
        )
        folders[CONTROL] = control.weights_folder
    return loaders, folders


def spread_softmax_heads(plan: Plan, heads: int) -> Plan:
    """The plan with as many softmax heads at even distances, of `heads` in each of the layers that are not the base's own."""
    ours = [i for i, layer in enumerate(plan.layers) if not layer.native]
    kept = sum(len(plan.layers[i].softmax_heads) for i in ours)
    if kept in (0, len(ours) * heads):
        raise ConfigError("--uniform: the student keeps none or all of its heads softmax; there is nothing to spread")
    layers = list(plan.layers)
    for i, chosen in zip(ours, spread_evenly(kept, len(ours), heads)):
        layers[i] = layers[i].with_softmax_heads(chosen)
    return replace(plan, layers=tuple(layers))


def _calibrated(source: Source, plan: Plan, student: Student):
    """Added parameters of another plan, calibrated as the student's were."""
    settings = student.manifest.settings.calibration
    if student.manifest.calibration is None or settings is None:
        return None
    from linearize.conversion.calibrate import calibrate
    from linearize.data.text_rows import text_rows

    rows = text_rows(source, plan.longest_window(), settings.text, settings.rows)
    return calibrate(source, plan, rows, settings.text).tensors


def _same_vocabulary(model, size: int, name: str):
    if model.config.vocab_size != size:
        raise ConfigError(
            f"--base: its vocabulary has {size} tokens, that of {name} {model.config.vocab_size}; their figures cannot be "
            "compared"
        )
    return model


def require_same_shape(source: Source, student: Student) -> None:
    """A plan names heads, and what a conversion adds is as large as they are."""
    from linearize.families.registry import find_family

    own = student.read_config()
    family = find_family(own["linearize"]["base_model_type"])
    config, own = ({**raw, **family.heads(raw)} for raw in (source.read_config(), own))
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if config.get(key) != own.get(key):
            raise ConfigError(
                f"--base: {source.name} has {key} {config.get(key)}, the student's base had {own.get(key)}; their figures "
                "cannot be compared"
            )


def require_same_tokenizer(source: Source, tokenizer) -> None:
    """Figures per token mean nothing when two models split text differently."""
    from transformers import AutoTokenizer

    if not any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    of_base = AutoTokenizer.from_pretrained(source.folder)
    differing = dict(of_base.get_vocab().items() ^ tokenizer.get_vocab().items())
    if differing:
        raise ConfigError(
            f"--base: its tokenizer differs from the student's in {len(differing)} entries, first "
            f"{min(differing)!r}; their figures cannot be compared"
        )


def fits_in_memory(folders: dict[str, Path], dtype, device: str) -> bool:
    """Whether all weights and what computing takes beside them have room in memory at once."""
    from linearize.checkpoint.weights import read_weights
    from linearize.device import available_memory

    parameters = sum(
        math.prod(info.shape) for folder in folders.values() for info in read_weights(folder).tensors.values()
    )
    return parameters * dtype.itemsize * HEADROOM <= available_memory(device)


def weights_fingerprint(student: Student) -> str:
    """Of a student: its records, and names, sizes and times of its weights, of an adapter alone with its parent's."""
    files = [path for folder in {student.folder, student.weights_folder} for path in folder.rglob("*.safetensors")]
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(files)]
    return sha256([(student.folder / MANIFEST).read_bytes(), *(line.encode() for line in stats)])
