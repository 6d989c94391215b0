"""Benchmarks, always beside the thing to beat and in alternation with it, because machines are shared and noisy."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.evaluation.lab import Lab
from linearize.mixers.registry import MIXERS, mixer_class
from linearize.mixers.structure import Site
from linearize.modeling.cache import CACHE_NAME
from linearize.report.results import STUDENT, Findings

# tokens that are decoded behind every prefill
DECODED = 8


def bench_structures(
    names: list[str],
    *,
    lengths: tuple[int, ...] = (2048, 8192),
    heads: int = 9,
    head_dim: int = 64,
    repeats: int = 5,
    device: str = "cpu",
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Forward and backward of every structure, gates and feature maps included, beside causal softmax attention.

    Args:
        heads, head_dim: of one layer without grouped queries; batch 1, float32.
        repeats: timings of each, taken in turn; medians count.

    Returns:
        one row a structure and length: seconds of both and their ratio.
    """
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, length, heads, head_dim, device=device, requires_grad=True) for _ in range(3))
        for name in names:
            structure = mixer_class(name)(Site(tuple(range(heads)), heads, 1, head_dim, 0, 1)).to(device)
            with torch.no_grad():
                structure.reset_parameters()
            times: dict[str, list[float]] = {"softmax": [], "structure": []}
            for _ in range(repeats):
                times["softmax"].append(_seconds(_softmax, q, k, v))
                times["structure"].append(_seconds(structure, q, k, v))
            softmax, ours = (statistics.median(times[kind]) for kind in ("softmax", "structure"))
            row = {
                "structure": name,
                "length": length,
                "softmax_seconds": softmax,
                "structure_seconds": ours,
                "ratio": ours / softmax,
            }
            rows.append(row)
            progress(row)
    return rows


def structure_names(text: str | None) -> list[str]:
    """The structures of a comma-separated list, all of them for none."""
    from linearize.errors import ConfigError, nearest

    if text is None:
        return list(MIXERS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MIXERS:
            raise ConfigError(f"--only: got '{name}', allowed are {', '.join(MIXERS)}{nearest(name, MIXERS)}")
    return names


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def _seconds(run: Callable[..., tuple], *inputs: Tensor) -> float:
    """Of run(*inputs)[0] forward and backward."""
    for x in inputs:
        x.grad = None
    _wait(inputs[0])
    start = time.perf_counter()
    run(*inputs)[0].sum().backward()
    _wait(inputs[0])
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
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
    _wait(ids)
    first = time.perf_counter() - started
    cache = result[CACHE_NAME]
    times = []
    for _ in range(DECODED):
        started = time.perf_counter()
        result = model(token, use_cache=True, **{CACHE_NAME: cache})
        token, cache = result.logits[:, -1:].argmax(-1), result[CACHE_NAME]
        _wait(ids)
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
