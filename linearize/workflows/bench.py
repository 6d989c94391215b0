"""Benchmarks, always beside the thing to beat and in alternation with it, because machines are shared and noisy."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.evaluation.efficiency import synchronize
from linearize.mixers.registry import MIXERS, mixer_class
from linearize.mixers.structure import Site


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
    synchronize(inputs[0])
    start = time.perf_counter()
    run(*inputs)[0].sum().backward()
    synchronize(inputs[0])
    return time.perf_counter() - start
