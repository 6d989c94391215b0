"""Describe this machine: versions, devices, kernels, memory, disk, hub; and say what will be slow on it."""

import shutil
from pathlib import Path
from typing import Any

import torch

from linearize.checkpoint.hub import hub_answers
from linearize.device import available_memory, bf16_is_fast, has_amx, total_memory, versions
from linearize.ops.dispatch import fla_available

GIB = 2**30
# room for a base of a billion parameters, its finetuned student, and the training state in between
COMFORTABLE_DISK = 10 * GIB


def examine() -> dict[str, Any]:
    """Return the facts about this machine, section by section, and advice in words under "advice"."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels, fast_bf16, hub = cuda and fla_available(), bf16_is_fast(), hub_answers()
    free_disk = shutil.disk_usage(Path.cwd()).free
    return {
        "versions": versions(),
        "devices": {
            "cuda": gpus or "none",
            "cpu threads": torch.get_num_threads(),
            "amx": has_amx(),
            "compute dtype": "bfloat16" if fast_bf16 else "float32",
        },
        "kernels": {"flash-linear-attention": "usable" if kernels else "not used"},
        "memory": {
            "total GiB": round(total_memory() / GIB, 1),
            "available GiB": round(available_memory("cpu") / GIB, 1),
        },
        "disk": {"free GiB here": round(free_disk / GIB, 1)},
        "hub": {"answers": hub},
        "advice": _advice(cuda, kernels, fast_bf16, hub, free_disk),
    }


def _advice(cuda: bool, kernels: bool, fast_bf16: bool, hub: bool, free_disk: int) -> list[str]:
    """Return one line for everything that will be slow or unavailable; one line that says so if nothing will be."""
    lines = []
    if not cuda:
        lines.append("no CUDA device: training runs at hundreds of tokens a second; budget 50K to 300K tokens")
    elif not kernels:
        lines.append(
            "no usable flash-linear-attention: the recurrent branch runs in PyTorch (pip install linearize[cuda])"
        )
    if not fast_bf16:
        lines.append("bf16 is not faster than float32 here, so `auto` computes in float32")
    if not hub:
        lines.append("the model hub does not answer: use local folders, .gguf files and the sample data")
    if free_disk < COMFORTABLE_DISK:
        lines.append(f"only {free_disk / GIB:.1f} GiB of disk are free here")
    return lines or ["nothing stands out"]
