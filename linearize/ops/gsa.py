"""Gated slot attention (GSA, arXiv 2409.07146, equation 6): keys and values written into slots that decay.

    K_t = diag(exp(log_decay_t)) K_{t-1} + s_t k_t^T
    V_t = diag(exp(log_decay_t)) V_{t-1} + s_t v_t^T
    o_t = V_t^T softmax(K_t q_t)

The rows of K [M, K] and V [M, V] are slots, each with a decay of its own. The first pass, `slot_scores`, has one score
per slot and token as its result; the second is gated linear attention over the slots (ops/gla.py).

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G), K key dim, V value dim, M slots. The state is
[B, J, M, K + V], both memories, float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from linearize.ops.chunks import chunks, grouped, segment_chunks, segment_masks, state_dtype, unchunked
from linearize.ops.dispatch import run_kernel
from linearize.ops.gla import gla

SLOT_CHUNK, SLOT_SUBCHUNK = 32, 8


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both passes, by the fastest operator available for these inputs.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V]. s, log_decay: as in `slot_scores`.
        initial_state: [B, J, M, K + V], zero when absent.
        segments: [B, T] document number of each token; the state is zeroed where it changes.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, M, K + V].
    """
    keywords = {"initial_state": initial_state, "segments": segments}
    with torch.autocast(q.device.type, enabled=False):
        ran = run_kernel(
            "fla.ops.gsa",
            "chunk_gsa",
            q,
            lambda: [k.to(q.dtype), v.to(q.dtype), s.to(q.dtype), log_decay.float()],
            adapt=_on_one_state,
            scale=1.0,
            **keywords,
        )
    if ran is not None:
        return ran[0].to(v.dtype), ran[1]
    keys = values = None
    if initial_state is not None:
        keys, values = initial_state.split([k.shape[-1], v.shape[-1]], dim=-1)
    scores, keys = slot_scores(q, k, s, log_decay, initial_state=keys, segments=segments)
    output, values = gla(scores.softmax(-1), s, v, log_decay, initial_state=values, segments=segments)
    return output, torch.cat([keys, values], dim=-1)


def _on_one_state(kernel):
    """fla keeps keys [K, M] and values [M, V] apart."""

    def run(q, k, v, *gates, initial_state=None, **keywords):
        if initial_state is not None:
            keys, values = initial_state.split([k.shape[-1], v.shape[-1]], dim=-1)
            initial_state = (keys.transpose(-1, -2), values)
        output, (keys, values) = kernel(q, k, v, *gates, initial_state=initial_state, **keywords)
        return output, torch.cat([keys.transpose(-1, -2), values], dim=-1)

    return run


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
