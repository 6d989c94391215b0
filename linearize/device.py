"""Choose a device and a precision, measure its memory, and record the versions that computed."""

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

# torch is imported inside functions: the command line answers --help and refuses bad options without it
if TYPE_CHECKING:
    import torch

# bytes of weights that stay in memory while a base is scored; larger models are read layer by layer
RESIDENT_BYTES = 512 << 20
# the same on CUDA devices, as a share of the memory that is free there; the rest is for activations
RESIDENT_SHARE = 0.6
# Linux' figures for the machine, and a container's limit and use (control groups version 2)
MEMINFO = Path("/proc/meminfo")
CONTAINER_LIMIT, CONTAINER_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# bytes from which a freed buffer goes back to the system
RETURNED_BYTES = 1 << 20
# set by `keep_freed_memory`
_keeps_freed_memory = False
# packages whose versions decide the results
RECORDED_PACKAGES = ("linearize", "torch", "transformers", "safetensors", "peft", "accelerate")


def pick_device() -> str:
    """Return "cuda" if this machine has a CUDA device, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def bf16_is_fast() -> bool:
    """Return True if bf16 is faster than float32 here.

    CUDA cards must compute in it, and CPUs need instructions for it (AMX, or AVX-512's).
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return has_amx() or bool(torch.cpu._is_avx512_bf16_supported())


def has_amx() -> bool:
    """Return True if the CPU has AMX, Intel's matrix instructions."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def compute_dtype(precision: str) -> "torch.dtype":
    """Return the dtype of weights and activations for `precision`: "auto", "bf16" or "fp32"."""
    import torch

    if precision == "auto":
        precision = "bf16" if bf16_is_fast() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def available_memory(device: str) -> int:
    """Return the bytes that can still be allocated on `device`, within the limits of a container."""
    import torch

    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    if not MEMINFO.is_file():  # not Linux: assume that all of it is free
        return total_memory()
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    kibibytes = int(fields["MemAvailable"].split()[0])
    free = 1024 * kibibytes
    if CONTAINER_LIMIT.is_file() and (limit := CONTAINER_LIMIT.read_text().strip()) != "max":
        free = min(free, int(limit) - int(CONTAINER_USE.read_text()))
    return free


def placement_of(nbytes: int, device: str) -> dict[str, str] | str | None:
    """Return where a model of `nbytes` of weights stays while it is scored, as Accelerate's device maps say it.

    Returns:
        All on `device`; "auto" over several CUDA devices, if it takes them all; None if it has to be read layer by
        layer.
    """
    if device == "cpu":
        return {"": device} if nbytes <= RESIDENT_BYTES else None
    import torch

    room = [RESIDENT_SHARE * torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    if nbytes <= room[0]:
        return {"": device}
    return "auto" if nbytes <= sum(room) else None


def total_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Make glibc reuse freed buffers instead of returning each to the kernel.

    Activations are freed and allocated again all the time. Faulting their pages in anew took a third of a training
    step on a CPU (SmolLM2-135M, 1,024 tokens: 6.5 s against 4.5 s). Elsewhere than on glibc this does nothing.

    Called before the first tensor, it also makes PyTorch ask for huge pages, which fault in 512 at a time
    (2,048 tokens: 13.5 s against 9.1 s).
    """
    global _keeps_freed_memory
    _keeps_freed_memory = True
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(MMAP_MAX, 0)


def return_freed_memory() -> None:
    """Make glibc return freed buffers to the kernel at once.

    Buffers of other sizes for every layer leave gaps that add up: the way back through 30 layers took 1.0 GiB where 0.4
    were in use. Elsewhere than on glibc, and after `keep_freed_memory`, this does nothing.
    """
    if not _keeps_freed_memory and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, RETURNED_BYTES)
        libc.mallopt(TRIM_THRESHOLD, RETURNED_BYTES)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the recorded packages, by name."""
    by_package = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = "not installed"
    return by_package
