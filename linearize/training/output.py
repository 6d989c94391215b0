"""Write the outcome of a training run: its figures, the adapter, and the parent's weights with the adapter merged."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from linearize.checkpoint.assets import copy_assets
from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.names import ADDED
from linearize.checkpoint.student import ADAPTER, UNTRAINED_FILE, Student
from linearize.checkpoint.weights import FLOATING, INDEX, read_weights
from linearize.checkpoint.writing import write_tensors
from linearize.modeling.export import PORTABLE_FILE
from linearize.modeling.loading import load_student, merge_adapters, untrained_parameters
from linearize.settings.recipe import CHANGES_BASE, Recipe
from linearize.training.schedule import ScheduledStage

# the last loss is the mean of this many steps, since single steps differ by their text
LAST_STEPS = 10
# names that safetensors give to the dtypes a model trains in
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def run_figures(metrics: Path, schedule: list[ScheduledStage], trained_tokens: int, seconds: float) -> dict[str, Any]:
    """Return the figures of a run that linearize.json records.

    Tokens, steps and stages are those of the whole run. Losses are those of the last stage, since stages measure
    different kinds.

    Args:
        metrics: the run's metrics.jsonl.
        trained_tokens, seconds: tokens trained in this call, and the time it took.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records[schedule[-1].steps_before :]]
    return {
        "tokens": records[-1]["tokens"],
        "steps": schedule[-1].total_steps,
        "stages": [{"name": scheduled.stage.name, "steps": scheduled.steps} for scheduled in schedule],
        "first_loss": losses[0],
        "last_loss": sum(losses[-LAST_STEPS:]) / len(losses[-LAST_STEPS:]),
        "seconds": seconds,
        "tokens_in_these_seconds": trained_tokens,
        "tokens_per_second": trained_tokens / seconds if trained_tokens else None,
    }


def write_adapter(folder: Path, adapted: PeftModel) -> None:
    """Write the adapter, with the added parameters, in PEFT's format."""
    adapted.save_pretrained(folder / ADAPTER)


def write_merged(
    folder: Path, parent: Student, adapted: PeftModel, recipe: Recipe, dtype: torch.dtype
) -> dict[str, str]:
    """Write the parent's checkpoint with the adapter merged in, beside the adapter that `write_adapter` wrote.

    Each tensor has its own dtype. Weights that were rounded for training are merged from the parent's whole ones.

    Args:
        dtype: the dtype that the model trained in.

    Returns:
        The hashes of config and index, for linearize.json.
    """
    if _rounds_weights(parent, recipe, dtype):
        adapted = PeftModel.from_pretrained(load_student(parent.folder, dtype=torch.float32), folder / ADAPTER)
    weights = merge_adapters(adapted).state_dict()
    for file in read_weights(parent.folder).files:
        with safe_open(parent.folder / file, framework="pt") as shard:
            tensors = {}
            for name in shard.keys():
                original = shard.get_tensor(name)
                # a tied head that the checkpoint leaves out is not in the shard either
                tensors[name] = weights[name].to("cpu", original.dtype).contiguous() if name in weights else original
            write_tensors(folder / file, tensors)
    copy_assets(parent.folder, folder, "config.json", PORTABLE_FILE, INDEX)
    if (untrained := untrained_parameters(parent)) is not None:
        write_tensors(folder / UNTRAINED_FILE, untrained)
    return {name: sha256(folder / name) for name in ("config.json", INDEX) if (folder / name).is_file()}


def _rounds_weights(parent: Student, recipe: Recipe, dtype: torch.dtype) -> bool:
    """Return True if the model trained with fewer bits, of range or of fraction, than its parent's checkpoint has."""
    if recipe.quantization:
        return True
    if recipe.lora.variant in CHANGES_BASE or dtype.itemsize >= 4:
        return False
    tensors = read_weights(parent.folder).tensors
    base_dtypes = {info.dtype for name, info in tensors.items() if ADDED not in name}
    return bool(base_dtypes & FLOATING - {SAFETENSORS_NAMES[dtype]})
