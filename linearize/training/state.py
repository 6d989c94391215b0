"""Save and load training states: safetensors for tensors, JSON for the rest, nothing pickled.

A state is a folder `step-00000100` in the work folder. It is written under another name, flushed and renamed, so a
killed run leaves whole states only. A state says itself which step it is and how its tensors hash; one that does not
fit is passed over for the one before it. It holds the trainable parameters, the optimizers' tensors, AdaLoRA's memory
and the random state. The position in the data and in the schedule follows from the step.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.json_file import read_json
from linearize.checkpoint.output_folder import sync
from linearize.checkpoint.writing import write_json, write_tensors
from linearize.errors import CheckpointError, ConfigError, one_line, raise_if_full
from linearize.training.model import Distiller

# the newest, and the one before it should the newest turn out damaged
STATES_ON_DISK = 2
# files of a state
TENSORS, RECORD = "state.safetensors", "state.json"


def save_state(
    work: Path,
    step: int,
    distiller: Distiller,
    optimizers: list[Optimizer],
    fingerprint: dict[str, Any],
) -> None:
    """Write the state after `step` optimizer steps, and remove all but the newest two.

    Raises:
        ResourceError: the disk is full.
    """
    target, partial = work / f"step-{step:08d}", work / ".state.partial"
    tensors = {name: value.contiguous() for name, value in _tensors_of(distiller, optimizers).items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tensors(partial / TENSORS, tensors)
        record = {"step": step, "fingerprint": fingerprint, "sha256": sha256(partial / TENSORS)}
        write_json(partial / RECORD, record)
        sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync(work)
    except OSError as error:
        raise_if_full(error, work)
        raise
    for old in _folders(work)[:-STATES_ON_DISK]:
        shutil.rmtree(old, ignore_errors=True)


def _tensors_of(distiller: Distiller, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Collect the tensors of a state, on the CPU."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in distiller.named_parameters()}
    tensors = {f"parameter/{name}": parameter for parameter, name in names.items() if parameter.requires_grad}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                tensors[f"optimizer/{entry}/{names[parameter]}"] = torch.as_tensor(value)
    tensors |= {f"memory/{name}": value for name, value in distiller.rank_memory().items()}
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_state(
    folder: Path, distiller: Distiller, optimizers: list[Optimizer], device: torch.device, stage_start: int
) -> None:
    """Load a saved state into model, optimizers and random generators.

    Args:
        stage_start: the step after which the current stage begins. A state of an earlier stage has other optimizers, so
            their tensors are left alone.
    """
    tensors = load_file(folder / TENSORS)
    parameters = dict(distiller.named_parameters())
    optimizer_of = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    memory: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "parameter":
                parameters[name].copy_(value)
            elif kind == "optimizer" and step_of(folder) > stage_start:
                entry, _, name = name.partition("/")
                parameter = parameters[name]
                # AdamW keeps its step counts on the CPU
                place = torch.device("cpu") if entry == "step" else device
                optimizer_of[parameter].state[parameter][entry] = value.to(place)
            elif kind == "memory":
                memory[name] = value.to(device)
    distiller.restore_rank_memory(memory)
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def saved_states(work: Path) -> list[Path]:
    """Return the folders of the saved states that are whole, oldest first."""
    return [folder for folder in _folders(work) if _fault(folder) is None]


def damaged_states(work: Path) -> dict[str, str]:
    """Return what is wrong with the states that `saved_states` passes over, by name."""
    return {folder.name: fault for folder in _folders(work) if (fault := _fault(folder)) is not None}


def _folders(work: Path) -> list[Path]:
    """Return the folders that are named as states are, oldest first."""
    return sorted(path for path in work.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _fault(folder: Path) -> str | None:
    """Say what is wrong with a state; None if it is whole."""
    if not (folder / TENSORS).is_file():
        return f"has no {TENSORS}"
    try:
        record = read_json(folder / RECORD)
        stated, digest, fingerprint = record["step"], record["sha256"], record["fingerprint"]
        if stated != step_of(folder):
            return f"says that it is of step {stated}"
        if not isinstance(fingerprint, dict) or digest != sha256(folder / TENSORS):
            return "its tensors are not those that were saved"
    except (OSError, CheckpointError, KeyError, TypeError) as error:
        return f"cannot be read ({one_line(error)})"
    return None


def step_of(state: Path) -> int:
    """Return the step that a saved state was written after."""
    return int(state.name.removeprefix("step-"))


def check_same_run(state: Path, fingerprint: dict[str, Any]) -> None:
    """Refuse to resume a run that was started with anything else, naming every field that differs.

    Raises:
        ConfigError: the fingerprint of the state differs from `fingerprint`.
    """
    saved, current = _flatten(read_json(state / RECORD)["fingerprint"]), _flatten(fingerprint)
    differing = [
        f"{key}: was {saved.get(key, 'absent')}, is {current.get(key, 'absent')}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{state.parent} holds an unfinished run with other settings ({'; '.join(differing)}); use the same, "
            "another OUT, or --restart to discard it"
        )


def check_metrics(path: Path, steps: int) -> None:
    """Refuse the log of an unfinished run that does not hold the steps up to its saved state.

    Raises:
        ConfigError: it is gone or damaged.
    """
    try:
        readable = path.is_file() and not path.is_symlink()
        lines = path.read_text(encoding="utf-8").splitlines() if readable else []
    except (OSError, ValueError):
        lines = []
    for number, line in enumerate([*lines, *[""] * steps][:steps], 1):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if not isinstance(record, dict) or record.get("step") != number or not _is_logged(record):
            raise ConfigError(f"{path}: damaged at line {number}; --restart discards the unfinished run")


def _is_logged(record: dict[str, Any]) -> bool:
    """Return True if a step's record has the numbers that a finished run is summed up by."""
    return isinstance(record.get("loss"), int | float) and isinstance(record.get("tokens"), int)


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key, with the types of JSON."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return json.loads(json.dumps(flat))
