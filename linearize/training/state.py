"""Training state on disk: safetensors for tensors, JSON for the rest, nothing pickled.

A state is a folder `step-00000100` in the work folder, written beside and renamed, so that a killed run leaves only
whole ones. It holds trainable parameters, what the optimisers keep, what AdaLoRA remembers and the random state; the position in the
data and in the schedule follow from the step.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from linearize.checkpoint.writing import raise_if_full, write_json
from linearize.errors import ConfigError
from linearize.training.model import Distiller

KEPT = 2


def save_state(
    work: Path,
    step: int,
    model: Distiller,
    optimizers: list[torch.optim.Optimizer],
    fingerprint: dict[str, Any],
) -> None:
    """Writes the state after `step` optimizer steps and drops all but the newest two."""
    names = _names(model)
    tensors = {
        f"parameter/{name}": value.detach().cpu() for name, value in model.named_parameters() if value.requires_grad
    }
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer/{key}/{names[parameter]}"] = torch.as_tensor(value).detach().cpu()
    tensors |= {f"memory/{name}": value.detach().cpu() for name, value in model.memory().items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    target, partial = work / f"step-{step:08d}", work / ".state.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial / "state.safetensors")
        write_json(partial / "state.json", {"step": step, "fingerprint": fingerprint})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:
        raise_if_full(error, work)
        raise
    for old in states(work)[:-KEPT]:
        shutil.rmtree(old)


def load_state(
    folder: Path, model: Distiller, optimizers: list[torch.optim.Optimizer], device: torch.device, stage_start: int
) -> None:
    """Puts a saved state into model, optimizers and random generators.

    Args:
        stage_start: the step at which the current stage began; of an earlier stage only the parameters are taken over.
    """
    tensors = load_file(folder / "state.safetensors")
    parameters = dict(model.named_parameters())
    record = json.loads((folder / "state.json").read_bytes())
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "parameter":
                parameters[rest].copy_(value)
            elif kind == "optimizer" and record["step"] > stage_start:
                entry, _, name = rest.partition("/")
                # AdamW keeps its step counts on the CPU
                where = torch.device("cpu") if entry == "step" else device
                parameter = parameters[name]
                owners[parameter].state[parameter][entry] = value.to(where)
    memory = {key.removeprefix("memory/"): value for key, value in tensors.items() if key.startswith("memory/")}
    model.restore({name: value.to(device) for name, value in memory.items()})
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def states(work: Path) -> list[Path]:
    """Saved states, oldest first."""
    return sorted(path for path in work.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any], work: Path) -> None:
    """Refuses to resume a run that was started with anything else, naming every field that differs."""
    flat_saved, flat_current = _flatten(saved), _flatten(current)
    differing = [
        f"{key}: was {flat_saved.get(key, 'absent')}, is {flat_current.get(key, 'absent')}"
        for key in sorted(flat_saved.keys() | flat_current.keys())
        if flat_saved.get(key) != flat_current.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{work} holds an unfinished run with other settings ({'; '.join(differing)}); use the same, another OUT, or "
            "--restart to discard it"
        )


def _flatten(value: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return json.loads(json.dumps(flat))


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {value: name for name, value in model.named_parameters()}
