"""Measure prefill and decode speed, cache size and peak memory of a student beside its base."""

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

from linearize.evaluation.lab import Lab
from linearize.modeling.cache import CACHE_NAME
from linearize.report.results import STUDENT, Findings

# tokens that are decoded behind every prefill
DECODED = 8


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def bench_model(
    student: PreTrainedModel, lengths: tuple[int, ...], *, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Inference of a linearized model beside its own softmax mode, which is the base: one row a context length.

    Each row has, for "base" and "student": prefill tokens/s, seconds to the first token, decode tokens/s, bytes of the
    cache, and the peak of resident (or device) memory above what was held before.
    """
    rows = []
    with torch.no_grad():
        for length in lengths:
            ids = torch.randint(student.config.vocab_size, (1, length), device=student.device)
            row: dict[str, Any] = {"length": length}
            for name, mode in (("base", student.softmax_attention), ("student", contextlib.nullcontext)):
                with mode():
                    row.update({f"{name}_{key}": value for key, value in _inference(student, ids).items()})
            rows.append(row)
            progress(f"efficiency at {length} tokens: student {row['student_prefill_tokens_per_second']:.0f} tokens/s")
    return rows


def measure_efficiency(lab: Lab, lengths: tuple[int, ...]) -> Findings:
    """`bench_model` of an evaluation's student, with the crossover lengths in words."""
    rows = lab.measure([STUDENT], lambda name, model: bench_model(model, lengths, progress=lab.progress))[STUDENT]
    return Findings(tables={"efficiency": rows}, notes=tuple(crossovers(rows)))


def crossovers(rows: list[dict[str, Any]]) -> list[str]:
    """Of prefill and decode; nothing from a single length."""
    if len(rows) < 2:
        return []
    return [f"{what}: {crossover(rows, f'{what}_tokens_per_second')}" for what in ("prefill", "decode")]


def crossover(rows: list[dict[str, Any]], figure: str) -> str:
    """In words, from which measured length on the student is ahead in `figure` (more is better)."""
    rows = sorted(rows, key=lambda row: row["length"])
    ahead = [row["length"] for row in rows if row[f"student_{figure}"] >= row[f"base_{figure}"]]
    behind = [row["length"] for row in rows if row["length"] not in ahead]
    if not ahead:
        return f"the student is behind the base at every length measured, up to {behind[-1]:,} tokens"
    if not behind:
        return f"the student is ahead of the base at every length measured, from {ahead[0]:,} tokens"
    first = next((length for length in ahead if length > max(behind)), None)
    if first is None:
        return (
            f"ahead at {', '.join(f'{n:,}' for n in ahead)} and behind at {', '.join(f'{n:,}' for n in behind)} tokens"
        )
    return f"the student overtakes the base between {max(behind):,} and {first:,} tokens"


def _inference(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    held = _reset_peak(model.device)
    started = time.perf_counter()
    result = model(ids, use_cache=True, logits_to_keep=1)
    token = result.logits[:, -1:].argmax(-1)
    synchronize(ids)
    first = time.perf_counter() - started
    cache = result[CACHE_NAME]
    times = []
    for _ in range(DECODED):
        started = time.perf_counter()
        result = model(token, use_cache=True, **{CACHE_NAME: cache})
        token, cache = result.logits[:, -1:].argmax(-1), result[CACHE_NAME]
        synchronize(ids)
        times.append(time.perf_counter() - started)
    return {
        "prefill_tokens_per_second": ids.shape[1] / first,
        "first_token_seconds": first,
        "decode_tokens_per_second": 1 / statistics.median(times),
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": max(0, _peak(model.device) - held),
    }


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that a cache of ours or of transformers holds."""
    return sum(
        layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if layer.get_seq_length()
    )


def _reset_peak(device: torch.device) -> int:
    """Starts a new peak of memory; returns what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # Linux and glibc alone can give back and forget
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0
