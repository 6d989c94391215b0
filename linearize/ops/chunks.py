"""Parts of all chunked operators: cut a sequence into chunks, mask across document borders, carry the state.

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G), K key dim, V value dim, N chunks, C chunk size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of recurrent states: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """Group queries by the key/value head that they read: [B, T, H, K] -> [B, T, J, G, K]."""
    return q.unflatten(2, (k.shape[2], -1))


def chunks(x: Tensor, size: int) -> Tensor:
    """Cut a sequence into chunks, zero-padded to whole ones: [B, T, J, ...] -> [B, J, N, size, ...]."""
    x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, -x.shape[1] % size)).unflatten(1, (-1, size))
    return x.movedim(3, 1).contiguous()


def unchunked(x: Tensor, T: int) -> Tensor:
    """Join chunks to the first T tokens of a sequence: [B, J, N, C, G, V] -> [B, T, J * G, V]."""
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :T]


def segment_chunks(segments: Tensor | None, size: int) -> Tensor | None:
    """Cut document numbers into chunks: [B, T] -> [B, 1, N, size]. The padding belongs to the last document."""
    if segments is None:
        return None
    return F.pad(segments[:, None], (0, -segments.shape[1] % size), mode="replicate").unflatten(2, (-1, size))


class SegmentMasks(NamedTuple):
    """Factors 0 or 1 that keep the documents of a row apart.

    Attributes:
        keep_in: [B, 1, N, C], 1 where a token may read the state that enters its chunk.
        keep_out: [B, 1, N, C], 1 where a token may write to the state that leaves its chunk.
        carry: [B, 1, N], 1 where the entering state survives the chunk.
        same: [B, 1, N, C, C], 1 where two tokens share a document.
    """

    keep_in: Tensor
    keep_out: Tensor
    carry: Tensor
    same: Tensor


def segment_masks(segments: Tensor | None, dtype: torch.dtype) -> SegmentMasks | None:
    """Return the masks of document numbers [B, 1, N, C], or None without any."""
    if segments is None:
        return None
    first, last = segments[..., :1], segments[..., -1:]
    before = torch.cat([first[:, :, :1], last[:, :, :-1]], dim=2)
    return SegmentMasks(
        keep_in=(segments == before).to(dtype),
        keep_out=(segments == last).to(dtype),
        carry=(before == last).squeeze(-1).to(dtype),
        same=(segments[..., :, None] == segments[..., None, :]).to(dtype),
    )


def times(x: Tensor, factor: Tensor | None, chunk: int | None = None) -> Tensor:
    """Multiply x by a factor, or by its part for one chunk; None stands for 1."""
    if factor is None:
        return x
    return x * (factor if chunk is None else factor[:, :, chunk])


def carried(state: Tensor, increments: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute S_{n+1} = carry_n S_n + increments_n, chunk after chunk.

    A CUDA device computes all chunks at once (`carried_at_once`): a loop would leave it idle.

    Args:
        state: [B, J, K, V], S_0. increments: [B, J, N, K, V].
        carry: [B or 1, J or 1, N, 1, 1], or None for 1.

    Returns:
        S_0 to S_{N-1}, [B, J, N, K, V], and S_N.
    """
    if state.is_cuda:
        return carried_at_once(state, increments, carry)
    states = []
    for n in range(increments.shape[2]):
        states.append(state)
        state = increments[:, :, n] + times(state, carry, n)
    return torch.stack(states, dim=2), state


def carried_at_once(state: Tensor, increments: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `carried` as one product with the factors between any two chunks."""
    N = increments.shape[2] + 1
    parts = torch.cat([state[:, :, None], increments], dim=2).flatten(3)  # added to S_0, S_1, ...
    if carry is None:
        states = parts.cumsum(2)
    else:
        below = torch.ones(N, N, dtype=torch.bool, device=state.device).tril(-1)
        steps = F.pad(carry.flatten(2), (1, 0))[..., None]  # [., ., N, 1]: from S_{n-1} to S_n
        factors = torch.where(below, steps, 1.0).cumprod(-2).tril()
        states = factors.to(parts.dtype) @ parts
    states = states.unflatten(3, state.shape[2:])
    return states[:, :, :-1], states[:, :, -1]


def scanned(state: Tensor, increments: Tensor, decay: Tensor, *, reverse: bool = False) -> list[Tensor]:
    """Compute S_{n+1} = decay_n S_n + increments_n, over the chunks in order or in reverse order.

    Args:
        state: [B, J, K, V], S_0.
        increments: [B, J, N, K, V].
        decay: [B, J, N, K, 1].

    Returns:
        S_0 to S_N in the order of the scan.
    """
    N = increments.shape[2]
    states = [state]
    for n in reversed(range(N)) if reverse else range(N):
        states.append(torch.addcmul(increments[:, :, n], decay[:, :, n], states[-1]))
    return states
