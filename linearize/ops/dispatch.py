"""Running a Triton kernel of flash-linear-attention in place of an operator of ours.

The kernels need a CUDA device and a `fla` that can be imported and run: an installed one can fail to import for want of
a matching triton, and some kernels refuse some devices (the gated backward on Hopper under triton 3.4 to 3.7.0). So
trying is the test. The mixers know nothing of this.

fla 0.6 differs from us in three ways: it wants as many key/value heads as query heads, documents of one row marked by
where they start, and a state for each document.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# (name of a kernel, shapes and dtypes) -> whether a first try went through
_tried: dict[tuple, bool] = {}
_enabled = True


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, PyTorch serves. What is computed once is done before fla has tried out the dozens of configurations of every
    kernel (minutes, on an H200, the first time)."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def run_kernel(
    module: str,
    name: str,
    q: Tensor,
    others: Callable[[], list[Tensor]],
    *,
    initial_state: Tensor | None,
    segments: Tensor | None,
    adapt: Callable[[Callable], Callable] | None = None,
    **keywords,
) -> tuple[Tensor, Tensor] | None:
    """What the kernel `module.name` computes, or None where it cannot serve this call.

    Args:
        q: [B, T, H, K]. others: its further inputs, [B, T, J, ...], made when they are needed.
        initial_state: [B, J, ...], zero when absent.
        segments: [B, T] document number of each token.
        adapt: makes a kernel that keeps its state otherwise look like the rest.
        keywords: further arguments of the kernel.

    Returns:
        output [B, T, H, V], final state [B, J, ...].
    """
    B, T, H, _ = q.shape
    kernel = load_kernel(module, name) if _enabled and on_device(q) and q.element_size() < 8 and T > 1 else None
    if kernel is None:
        return None
    kernel, inputs = adapt(kernel) if adapt else kernel, others()
    group, last = H // inputs[0].shape[2], slice(None)
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
    """Documents of all rows in one: where each begins (and the last ends), and the first and last of every row."""
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    of_row = starts.sum(1).cumsum(0)
    bounds = F.pad(starts.flatten().nonzero().squeeze(-1), (0, 1), value=segments.numel())
    return bounds, F.pad(of_row[:-1], (1, 0)), of_row - 1


def _works(kernel: Callable, name: str, inputs: list[Tensor], keywords: dict) -> bool:
    """Whether the kernel goes through on two tokens like these, backward included where gradients are wanted."""
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
        except Exception as error:  # whatever a compiler or a driver comes up with
            warnings.warn(f"{name} of flash-linear-attention does not run here, PyTorch serves: {error}", stacklevel=2)
            _tried[key] = False
    return _tried[key]


def on_device(x: Tensor) -> bool:
    return x.is_cuda


def fla_available() -> bool:
    return load_kernel("fla.ops.gla", "chunk_gla") is not None


@functools.cache
def load_kernel(module: str, name: str) -> Callable | None:
    """The kernel, or None where it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # a broken triton raises anything from ImportError to RuntimeError
        return None
