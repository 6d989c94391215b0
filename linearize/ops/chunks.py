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
