"""What this machine has, and what will be slow on it."""

import shutil
from pathlib import Path
from typing import Any

from linearize.device import versions


def examine() -> dict[str, Any]:
    """Versions, devices, kernels, memory and disk, with advice in words."""
    import torch

    from linearize.checkpoint.hub import hub_answers
    from linearize.device import available_memory, bf16_is_fast, has_amx, total_memory
    from linearize.ops.dispatch import fla_available

    cuda = torch.cuda.is_available()
    hub = hub_answers()
    free_disk = shutil.disk_usage(Path.cwd()).free
    advice = []
    if not cuda:
        advice.append("no CUDA device: training runs at hundreds of tokens a second; budget 50K to 300K tokens")
    elif not fla_available():
        advice.append(
            "no usable flash-linear-attention: the recurrent branch runs in PyTorch (pip install linearize[cuda])"
        )
    if not bf16_is_fast():
        advice.append("bf16 is not faster than float32 here, so `auto` computes in float32")
    if not hub:
        advice.append("the model hub does not answer: use local folders, .gguf files and the sample data")
    if free_disk < 10 * 2**30:
        advice.append(f"only {free_disk / 2**30:.1f} GiB of disk are free here")
    return {
        "versions": versions(),
        "devices": {
            "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none",
            "cpu threads": torch.get_num_threads(),
            "amx": has_amx(),
            "compute dtype": "bfloat16" if bf16_is_fast() else "float32",
        },
        "kernels": {"flash-linear-attention": "usable" if cuda and fla_available() else "not used"},
        "memory": {
            "total GiB": round(total_memory() / 2**30, 1),
            "available GiB": round(available_memory("cpu") / 2**30, 1),
        },
        "disk": {"free GiB here": round(free_disk / 2**30, 1)},
        "hub": {"answers": hub},
        "advice": advice or ["nothing stands out"],
    }
