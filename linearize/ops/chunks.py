"""What the chunked operators share: cutting a sequence into chunks, and who sees whom at document borders."""

import torch
from torch import Tensor
from torch.nn import functional as F


def state_dtype(x: Tensor) -> torch.dtype:
    """Recurrent states are float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """Queries beside the key/value head they read: [B, T, H, K] -> [B, T, J, G, K]."""
    return q.unflatten(2, (k.shape[2], -1))


def chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, J, ...] -> [B, J, N, size, ...], zero-padded to whole chunks."""
    x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, -x.shape[1] % size)).unflatten(1, (-1, size))
    return x.movedim(3, 1).contiguous()


def unchunked(x: Tensor, T: int) -> Tensor:
    """[B, J, N, C, G, V] -> [B, T, J * G, V]."""
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :T]


def segment_chunks(segments: Tensor | None, size: int) -> Tensor | None:
    """Document numbers [B, T] -> [B, 1, N, size]; the padding belongs to the last document."""
    if segments is None:
        return None
    return F.pad(segments[:, None], (0, -segments.shape[1] % size), mode="replicate").unflatten(2, (-1, size))


def segment_masks(segments: Tensor | None, dtype: torch.dtype):
    """Which tokens may read the entering state, write to the leaving one, whether it survives, and who sees whom.

    Args:
        segments: [B, 1, N, C] or None.

    Returns:
        [B, 1, N, C], [B, 1, N, C], [B, 1, N], [B, 1, N, C, C]; or four times None.
    """
    if segments is None:
        return None, None, None, None
    first, last = segments[..., :1], segments[..., -1:]
    before = torch.cat([first[:, :, :1], last[:, :, :-1]], dim=2)
    keep_in = (segments == before).to(dtype)
    keep_out = (segments == last).to(dtype)
    carry = (before == last).squeeze(-1).to(dtype)
    same = (segments[..., :, None] == segments[..., None, :]).to(dtype)
    return keep_in, keep_out, carry, same


def times(x: Tensor, factor: Tensor | None, chunk: int | None = None) -> Tensor:
    """x by a factor, or by its part for one chunk; None is 1."""
    if factor is None:
        return x
    return x * (factor if chunk is None else factor[:, :, chunk])


def carried(state: Tensor, increments: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_{n+1} = carry_n S_n + increments_n, chunk after chunk.

    On a device all at once, by a product with the factors between any two chunks: a loop would leave it idle.

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
    """The same; see `carried`."""
    N = increments.shape[2] + 1
    parts = torch.cat([state[:, :, None], increments], dim=2).flatten(3)  # what enters at S_0, S_1, ...
    if carry is None:
        states = parts.cumsum(2)
    else:
        below = torch.ones(N, N, dtype=torch.bool, device=state.device).tril(-1)
        steps = F.pad(carry.flatten(2), (1, 0))[..., None]  # [., ., N, 1]: from S_{n-1} to S_n
        factors = torch.where(below, steps, 1.0).cumprod(-2).tril()
        states = factors.to(parts.dtype) @ parts
    states = states.unflatten(3, state.shape[2:])
    return states[:, :, :-1], states[:, :, -1]
