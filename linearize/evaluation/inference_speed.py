"""Time prefill and decoding of a linearized model, and measure its cache and peak memory, beside softmax attention."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.modeling.cache import CACHE_NAME


def synchronize(x: Tensor) -> None:
    """Wait until the device of `x` has finished its work, so that a clock read next counts all of it."""
    if x.is_cuda:
        torch.cuda.synchronize()


def bench_model(
    student: PreTrainedModel,
    lengths: tuple[int, ...],
    new_tokens: int,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Time a linearized model beside its own softmax mode, which is the base.

    Args:
        lengths: tokens of context.
        new_tokens: tokens to decode behind each context.

    Returns:
        One row a context length. Each has, with the prefixes base_ and student_: prefill_tokens_per_second,
        first_token_seconds, decode_tokens_per_second, cache_bytes, and peak_bytes, the peak of resident (or device)
        memory above the memory in use before.
    """
    modes: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
        "base": student.softmax_attention,
        "student": contextlib.nullcontext,
    }
    rows = []
    with torch.no_grad():
        for length in lengths:
            ids = torch.randint(student.config.vocab_size, (1, length), device=student.device)
            row: dict[str, Any] = {"length": length}
            for name, mode in modes.items():
                with mode():
                    row.update({f"{name}_{key}": value for key, value in _time_one(student, ids, new_tokens).items()})
            rows.append(row)
            progress(f"efficiency at {length} tokens: student {row['student_prefill_tokens_per_second']:.0f} tokens/s")
    return rows


def _time_one(model: Any, ids: Tensor, new_tokens: int) -> dict[str, float]:
    memory_before = _reset_peak(model.device)
    started = time.perf_counter()
    result = model(ids, use_cache=True, logits_to_keep=1)
    token = result.logits[:, -1:].argmax(-1)
    synchronize(ids)
    first = time.perf_counter() - started
    cache = result[CACHE_NAME]
    seconds = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        result = model(token, use_cache=True, **{CACHE_NAME: cache})
        token, cache = result.logits[:, -1:].argmax(-1), result[CACHE_NAME]
        synchronize(ids)
        seconds.append(time.perf_counter() - started)
    return {
        "prefill_tokens_per_second": ids.shape[1] / first,
        "first_token_seconds": first,
        "decode_tokens_per_second": 1 / statistics.median(seconds),
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": max(0, _peak(model.device) - memory_before),
    }


def cache_bytes(cache: Any) -> int:
    """Return the bytes of every tensor in a cache of ours or of transformers."""
    return sum(
        layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if layer.get_seq_length()
    )


def _reset_peak(device: torch.device) -> int:
    """Start a new peak of memory; return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # only Linux with glibc can return memory and forget the peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _process_status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_status("VmHWM")


def _process_status(key: str) -> int:
    """Return a size of this process in bytes from /proc, 0 where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0
