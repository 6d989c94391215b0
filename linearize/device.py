"""Where to compute and in what precision."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# weights that a CPU gets through in seconds to minutes
CPU_LIMIT = 1 << 30


def pick_device() -> str:
    """ "cuda" where there is such a device, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def bf16_is_fast() -> bool:
    """bf16 on CUDA cards that compute in it, and on CPUs with instructions for it (AMX, or AVX-512's); elsewhere float32
    is faster."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return has_amx() or bool(torch.cpu._is_avx512_bf16_supported())


def has_amx() -> bool:
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def compute_dtype(precision: str) -> Any:
    """The dtype of weights and activations for `precision` auto, bf16 or fp32."""
    import torch

    if precision == "auto":
        precision = "bf16" if bf16_is_fast() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def available_memory(device: str) -> int:
    """Bytes that can still be taken on a device, within the limits of a container."""
    import torch

    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux: all there is
        return total_memory()
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = [1024 * int(fields["MemAvailable"].split()[0])]
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int(used.read_text()))
    return min(free)


def base_runs(nbytes: int) -> bool:
    """Whether a base of so many bytes of weights can be run here in reasonable time: a GPU has room for it, or it is small."""
    import torch

    if torch.cuda.is_available():
        return nbytes < 0.7 * torch.cuda.mem_get_info()[0]
    return nbytes <= CPU_LIMIT


def total_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Asks glibc to keep freed buffers instead of returning each to the kernel.

    Activations are freed and allocated again all the time; faulting their pages in anew took a third of a training
    step on a CPU (SmolLM2-135M, 1024 tokens, 6.5 s against 4.5 s). Elsewhere than on glibc this does nothing. Before the
    first tensor it also has PyTorch ask for huge pages, which fault in 512 at a time (there, 2048 tokens, 13.5 s against 9.1 s).
    """
    import ctypes
    import platform

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


PACKAGES = ("linearize", "torch", "transformers", "safetensors", "peft", "accelerate")


def versions() -> dict[str, str]:
    """Python's and the packages' versions, for the record."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
