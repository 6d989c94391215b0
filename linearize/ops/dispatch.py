"""Running a Triton kernel of flash-linear-attention in place of an operator of ours.

The kernels need a CUDA device and an importable `fla` (an installed one can still fail to import for want of a
matching triton), so importing is the test. The mixers know nothing of this.

fla 0.6 differs from us in three ways: it wants as many key/value heads as query heads, documents of one row marked by
where they start, and a state for each document.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# kernels whose backward fla refuses on Hopper under triton 3.4 to 3.7.0 (flash-linear-attention issue 640)
REFUSED_ON_HOPPER = ("chunk_simple_gla", "chunk_gated_delta_rule")


def fla_operator(module: str, name: str, reference: Tensor) -> Callable | None:
    """The kernel `module.name`, or None where it cannot serve sequences like `reference` [B, T, ...]."""
    if not on_device(reference) or reference.element_size() == 8 or reference.shape[1] < 2:
        return None
    kernel = _load(module, name)
    if kernel is None or (name in REFUSED_ON_HOPPER and torch.is_grad_enabled() and _backward_refused()):
        return None
    return kernel


def run_kernel(
    kernel: Callable,
    q: Tensor,
    *others: Tensor,
    initial_state: Tensor | None,
    segments: Tensor | None,
    **keywords,
) -> tuple[Tensor, Tensor]:
    """Calls a kernel with heads, documents and states the way it wants them.

    Args:
        q: [B, T, H, K]. others: [B, T, J, ...].
        initial_state: [B, J, ...], zero when absent.
        segments: [B, T] document number of each token.
        keywords: further arguments of the kernel.

    Returns:
        output [B, T, H, V], final state [B, J, ...].
    """
    B, T, H, _ = q.shape
    group, last = H // others[0].shape[2], slice(None)
    inputs = [q, *(x.repeat_interleave(group, dim=2) for x in others)]
    state = None if initial_state is None else initial_state.repeat_interleave(group, dim=1)
    if segments is not None:
        keywords["cu_seqlens"], first, last = _documents(segments)
        inputs = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
        if state is not None:
            documents = len(keywords["cu_seqlens"]) - 1
            state = state.new_zeros(documents, *state.shape[1:]).index_copy(0, first, state)
    output, final = kernel(*inputs, initial_state=state, output_final_state=True, **keywords)
    return output.reshape(B, T, H, -1), final[last][:, ::group]


def _documents(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of all rows in one: where each begins (and the last ends), and the first and last of every row."""
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    of_row = starts.sum(1).cumsum(0)
    bounds = F.pad(starts.flatten().nonzero().squeeze(-1), (0, 1), value=segments.numel())
    return bounds, F.pad(of_row[:-1], (1, 0)), of_row - 1


def on_device(x: Tensor) -> bool:
    return x.is_cuda


def fla_available() -> bool:
    return _load("fla.ops.gla", "chunk_gla") is not None


@functools.cache
def _load(module: str, name: str) -> Callable | None:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # a broken triton raises anything from ImportError to RuntimeError
        return None


@functools.cache
def _backward_refused() -> bool:
    facts = importlib.import_module("fla.utils")
    broken = facts.IS_NVIDIA_HOPPER and facts.TRITON_ABOVE_3_4_0 and not facts.TRITON_ABOVE_3_7_1
    return broken and importlib.util.find_spec("tilelang") is None
