"""Run a Triton kernel of flash-linear-attention (fla) in place of an operator of this package, where one works.

The kernels need a CUDA device and an `fla` that can be imported and run. An installed one can fail to import without a
matching triton, and some kernels refuse some devices (the gated backward on Hopper under triton 3.4 to 3.7.0). So each
kernel is tried on two tokens first. The mixers know nothing of this.

fla 0.6 differs in three ways: it needs as many key/value heads as query heads, all documents in one row with the
positions where they start, and one state per document.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# (name of a kernel, gradients, shapes and dtypes) -> True if the first try succeeded
_tried: dict[tuple[Any, ...], bool] = {}
_enabled = True


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Use PyTorch alone inside. A single pass is done before fla has tuned the configurations of its kernels.

    Tuning takes minutes on an H200 the first time.
    """
    global _enabled
    previous, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = previous


def run_kernel(
    module: str,
    name: str,
    q: Tensor,
    others: Callable[[], list[Tensor]],
    *,
    initial_state: Tensor | None,
    segments: Tensor | None,
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor] | None:
    """Run the kernel `module.name`; return None if it cannot serve this call.

    Args:
        q: [B, T, H, K].
        others: return its other inputs, [B, T, J, ...]. Called only if there is a kernel, so that no cast is wasted.
        initial_state: [B, J, ...], zero when absent.
        segments: [B, T] document number of each token.
        adapt: wrap a kernel whose state has another layout.
        keywords: other arguments of the kernel.

    Returns:
        output [B, T, H, V], final state [B, J, ...].
    """
    B, T, H, _ = q.shape
    kernel = load_kernel(module, name) if _enabled and on_device(q) and q.element_size() < 8 and T > 1 else None
    if kernel is None:
        return None
    kernel, inputs = adapt(kernel) if adapt else kernel, others()
    group = H // inputs[0].shape[2]
    last: slice | Tensor = slice(None)
    inputs = [q, *(x.repeat_interleave(group, dim=2) for x in inputs)]
    if not _works(kernel, name, inputs, keywords):
        return None
    state = None if initial_state is None else initial_state.repeat_interleave(group, dim=1)
    if segments is not None:
        keywords["cu_seqlens"], first, last = _documents(segments.expand(B, -1))
        inputs = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
        if state is not None:
            documents = len(keywords["cu_seqlens"]) - 1
            state = state.new_zeros(documents, *state.shape[1:]).index_copy(0, first, state)
    output, final = kernel(*inputs, initial_state=state, output_final_state=True, **keywords)
    return output.reshape(B, T, H, -1), final[last][:, ::group]


def _documents(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bounds of all rows' documents, joined to one row, and the first and last document of every row."""
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    of_row = starts.sum(1).cumsum(0)
    bounds = F.pad(starts.flatten().nonzero().squeeze(-1), (0, 1), value=segments.numel())
    return bounds, F.pad(of_row[:-1], (1, 0)), of_row - 1


def _works(kernel: Callable[..., Any], name: str, inputs: list[Tensor], keywords: dict[str, Any]) -> bool:
    """Return True if the kernel runs on two tokens like these, and backward too while gradients are enabled."""
    gradients = torch.is_grad_enabled()
    key = (name, gradients, *((x.shape[2:], x.dtype, x.device) for x in inputs))
    if key not in _tried:
        if all(tried[0] != name for tried in _tried):
            warnings.warn(
                f"{name} of flash-linear-attention is compiled and tuned for this device, minutes when it is new to it",
                stacklevel=2,
            )
        few = [x[:1, :2].detach().requires_grad_(gradients) for x in inputs]
        try:
            output, _ = kernel(*few, output_final_state=True, **keywords)
            if gradients:
                output.sum().backward()
            _tried[key] = True
        except Exception as error:  # compilers and drivers raise anything
            warnings.warn(f"{name} of flash-linear-attention does not run here, PyTorch serves: {error}", stacklevel=2)
            _tried[key] = False
    return _tried[key]


def on_device(x: Tensor) -> bool:
    """Return True for a tensor on a CUDA device; tests replace this."""
    return x.is_cuda


def fla_available() -> bool:
    """Return True if fla can be imported."""
    return load_kernel("fla.ops.gla", "chunk_gla") is not None


@functools.cache
def load_kernel(module: str, name: str) -> Callable[..., Any] | None:
    """Import a kernel; return None if it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # a broken triton raises anything from ImportError to RuntimeError
        return None
