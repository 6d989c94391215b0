"""Time mixers beside softmax attention, and a linearized model beside its base.

Both sides of a comparison run in turn, because machines are shared and noisy.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.device import compute_dtype, pick_device
from linearize.errors import ConfigError
from linearize.evaluation.efficiency import DECODED_TOKENS
from linearize.evaluation.inference_speed import bench_model, synchronize
from linearize.mixers.mixer import Site
from linearize.mixers.registry import build_mixer
from linearize.modeling.loading import load_student, positions_of

LENGTHS = (2048, 8192)


def bench_student(
    folder: Path, lengths: tuple[int, ...] | None = None, *, progress: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Measure prefill, decode, cache and memory of a linearized model beside its base, at every context length.

    Args:
        folder: a linearized checkpoint.
        lengths: tokens of context. None measures at 2,048 and 8,192, as far as the model's positions go.

    Returns:
        one row a length, as `bench_model` returns them.

    Raises:
        ConfigError: the model has too few positions for one of `lengths`.
    """
    positions = positions_of(folder) - DECODED_TOKENS
    if lengths is not None and max(lengths) > positions:
        raise ConfigError(
            f"--lengths: got {max(lengths)}, the model has positions for {positions} and {DECODED_TOKENS} more"
        )
    if lengths is None:
        lengths = tuple(length for length in LENGTHS if length <= positions) or (positions,)
    student = load_student(folder, dtype=compute_dtype("auto")).to(pick_device())
    return bench_model(student, lengths, DECODED_TOKENS, progress=progress)


def bench_mixers(
    names: list[str],
    lengths: tuple[int, ...] | None = None,
    *,
    heads: int = 9,
    head_dim: int = 64,
    repeats: int = 5,
    device: str | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Time forward and backward of every mixer, gates and feature maps included, beside causal softmax attention.

    Args:
        lengths: tokens of the sequences (default: 2,048 and 8,192).
        heads, head_dim: heads of the one layer, without grouped queries, and dimensions of each; batch 1, float32.
        repeats: timings of each; their medians count.
        report: called with every row as soon as it is measured.

    Returns:
        one row a length and mixer: the seconds of both, and their ratio.
    """
    device = device or pick_device()
    rows = []
    for length in lengths or LENGTHS:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, length, heads, head_dim, device=device, requires_grad=True) for _ in range(3))
        for name in names:
            mixer = _mixer(name, heads, head_dim).to(device)
            softmax_timings, mixer_timings = [], []
            for _ in range(repeats):
                softmax_timings.append(_time_forward_backward(_softmax_attention, q, k, v))
                mixer_timings.append(_time_forward_backward(mixer, q, k, v))
            softmax_seconds, mixer_seconds = statistics.median(softmax_timings), statistics.median(mixer_timings)
            row = {
                "structure": name,
                "length": length,
                "softmax_seconds": softmax_seconds,
                "structure_seconds": mixer_seconds,
                "ratio": mixer_seconds / softmax_seconds,
            }
            rows.append(row)
            if report is not None:
                report(row)
    return rows


def _mixer(name: str, heads: int, head_dim: int) -> nn.Module:
    """Build the mixer for the one layer of a model, with freshly initialised parameters."""
    site = Site(heads=tuple(range(heads)), total_heads=heads, group=1, head_dim=head_dim, layer=0, layers=1)
    mixer = build_mixer(name, site, {})
    with torch.no_grad():
        mixer.reset_parameters()
    return mixer


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """Compute causal softmax attention over [B, T, H, K]; the one output is [B, H, T, K]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def _time_forward_backward(attend: Callable[..., tuple], *inputs: Tensor) -> float:
    """Return the seconds that `attend(*inputs)` takes, together with the backward pass from its first output.

    A device computes in the background, so the clock is read when the device of the inputs has nothing left to do.
    """
    for x in inputs:
        x.grad = None  # adding to an earlier gradient would take time, too
    synchronize(inputs[0])
    start = time.perf_counter()
    attend(*inputs)[0].sum().backward()
    synchronize(inputs[0])
    return time.perf_counter() - start
