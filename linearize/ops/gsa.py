"""Writing keys into gated slots and reading them back (first pass of GSA, arXiv 2409.07146, equation 6).

    K_t = diag(exp(log_decay_t)) K_{t-1} + s_t k_t^T
    o_t = scale * K_t q_t

The rows of K [M, K] are slots, each with a decay of its own, and the result has one score per slot. The second pass,
V_t^T softmax(o_t), is gated linear attention over the slots (ops/gla.py).

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G), K key dim, M slots.
"""

import torch
from torch import Tensor

from linearize.ops.chunks import chunks, grouped, segment_chunks, segment_masks, state_dtype, unchunked

SLOT_CHUNK, SLOT_SUBCHUNK = 32, 8


def slot_scores(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of every query over the slots, in chunks; every exponent is at most zero.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. s: [B, T, J, M]: what the token writes to each slot.
        log_decay: [B, T, J, M], at most zero.
        initial_state: [B, J, M, K], zero when absent.
        segments: [B, T] document number of each token; the state is zeroed where it changes.

    Returns:
        scores [B, T, H, M], final state [B, J, M, K].
    """
    dtype, T, (B, _, J, K), M = state_dtype(q), q.shape[1], k.shape, s.shape[-1]
    with torch.autocast(q.device.type, enabled=False):
        state = q.new_zeros(B, J, M, K, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        if T == 0:
            return s.new_zeros(B, 0, q.shape[2], M), state
        q_ = chunks(grouped(q, k).to(dtype) * scale, SLOT_CHUNK)
        k_, s_, g_ = (chunks(x.to(dtype), SLOT_CHUNK) for x in (k, s, log_decay))
        output, final = _slot_chunks(q_, k_, s_, g_.cumsum(-2), state, segment_chunks(segments, SLOT_CHUNK))
        return unchunked(output, T).to(s.dtype), final


def _slot_chunks(q, k, s, b, state, segments) -> tuple[Tensor, Tensor]:
    keep_in, keep_out, carry, same = segment_masks(segments, q.dtype)
    G = q.shape[4]
    products = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, q.shape[3:5])
    if same is not None:
        products = products * same[..., None, :]
    from_state, to_state, across = b.exp(), (b[..., -1:, :] - b).exp(), b[..., -1, :].exp().unsqueeze(-1)
    if segments is not None:
        from_state, to_state = from_state * keep_in[..., None], to_state * keep_out[..., None]
        across = across * carry[..., None, None]

    later = torch.ones(SLOT_SUBCHUNK, SLOT_SUBCHUNK, dtype=torch.bool, device=q.device).triu(1)
    inside = []
    for start in range(0, SLOT_CHUNK, SLOT_SUBCHUNK):
        rows = slice(start, start + SLOT_SUBCHUNK)
        difference = b[..., rows, None, :] - b[..., None, rows, :]
        near = difference.masked_fill(later[..., None], float("-inf")).exp() * s[..., None, rows, :]
        scores = products[..., rows, :, rows] @ near
        if start:
            reference = b[..., start - 1 : start, :]
            far = s[..., :start, :] * (reference - b[..., :start, :]).exp()
            past = (products[..., rows, :, :start].flatten(3, 4) @ far).unflatten(3, (-1, G))
            scores = scores + past * (b[..., rows, :] - reference).exp().unsqueeze(-2)
        inside.append(scores)

    increments = (s * to_state).transpose(-1, -2) @ k
    states = []
    for increment, kept in zip(increments.unbind(2), across.unbind(2)):
        states.append(state)
        state = increment + kept * state
    read = (q.flatten(3, 4) @ torch.stack(states, dim=2).transpose(-1, -2)).unflatten(3, q.shape[3:5])
    return torch.cat(inside, dim=3) + read * from_state.unsqueeze(-2), state
