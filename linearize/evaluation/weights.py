"""Decide which sets of weights an evaluation needs, how each is loaded, and whether all fit into memory at once."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.source import Source
from linearize.conversion.keep_softmax import spread_evenly
from linearize.errors import ConfigError
from linearize.evaluation.suite import Suite
from linearize.plan import Plan
from linearize.report.results import CONTROL, STUDENT, UNIFORM

# what computing takes beside the weights
HEADROOM = 1.25


def weight_loaders(
    model: Path, manifest: dict[str, Any], source: Source, suite: Suite, dtype
) -> tuple[dict[str, Callable], dict[str, Path]]:
    """The sets of weights of an evaluation: functions that load them, and the folders they come from."""
    from linearize.checkpoint.student import read_manifest
    from linearize.evaluation.lab import REFERENCE
    from linearize.modeling.loading import load_student, load_unconverted, untrained_parameters

    plan = Plan.from_dict(manifest["plan"])
    vocabulary = source.read_config()["vocab_size"]
    loaders: dict[str, Callable] = {
        REFERENCE: lambda: load_unconverted(source, plan, dtype=dtype, added=untrained_parameters(model, manifest)),
        STUDENT: lambda: _same_vocabulary(load_student(model, dtype=dtype), vocabulary, "the student"),
    }
    folders = {REFERENCE: source.folder, STUDENT: model}
    if suite.uniform:
        heads = manifest["coverage"]["heads"] // len(plan.layers)
        uniform = spread_softmax_heads(plan, heads)
        loaders[UNIFORM] = lambda: load_unconverted(
            source, uniform, dtype=dtype, added=_calibrated(source, uniform, manifest)
        )
        folders[UNIFORM] = source.folder
    if suite.control is not None:
        folder = Path(suite.control)
        control = read_manifest(folder)
        if control["base"]["fingerprint"] != manifest["base"]["fingerprint"]:
            raise ConfigError(
                f"--control: {folder} comes from another base ({control['base']['name']}) than the student"
            )
        if control["coverage"]["heads_converted"]:
            raise ConfigError(
                f"--control: {folder} has {control['coverage']['heads_converted']} linear heads; a control is the base "
                "with the student's recipe (`linearize convert --keep-softmax all`, then `linearize finetune`)"
            )
        loaders[CONTROL] = lambda: _same_vocabulary(load_student(folder, dtype=dtype), vocabulary, "the control")
        folders[CONTROL] = folder
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


def _calibrated(source: Source, plan: Plan, manifest: dict[str, Any]):
    """Added parameters of another plan, calibrated as the student's were."""
    if not manifest.get("calibration"):
        return None
    from linearize.conversion.calibrate import calibrate
    from linearize.data.text_rows import text_rows

    settings = manifest["settings"]["calibration"]
    rows = text_rows(source, plan.longest_window(), settings["text"], settings["rows"])
    return calibrate(source, plan, rows, settings["text"]).tensors


def _same_vocabulary(model, size: int, name: str):
    if model.config.vocab_size != size:
        raise ConfigError(
            f"--base: its vocabulary has {size} tokens, that of {name} {model.config.vocab_size}; their figures cannot be "
            "compared"
        )
    return model


def require_same_shape(source: Source, model: Path) -> None:
    """A plan names heads, and what a conversion adds is as large as they are."""
    from linearize.checkpoint.student import weights_folder
    from linearize.families.registry import find_family

    own = json.loads((weights_folder(model) / "config.json").read_bytes())
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
    from linearize.checkpoint.student import weights_folder
    from linearize.checkpoint.weights import read_weights
    from linearize.device import available_memory

    parameters = sum(
        math.prod(info.shape)
        for folder in folders.values()
        for info in read_weights(weights_folder(folder)).tensors.values()
    )
    return parameters * dtype.itemsize * HEADROOM <= available_memory(device)


def weights_fingerprint(model: Path) -> str:
    """Of a student: its records, and names, sizes and times of its weights, of an adapter alone with its parent's."""
    from linearize.checkpoint.student import weights_folder

    files = [path for folder in {model, weights_folder(model)} for path in folder.rglob("*.safetensors")]
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(files)]
    return sha256([(model / MANIFEST).read_bytes(), *(line.encode() for line in stats)])
