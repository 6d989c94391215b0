"""Gated slot attention (GSA, arXiv 2409.07146, equation 6): tokens write keys and values into slots that decay.

    K_t = diag(exp(log_decay_t)) K_{t-1} + s_t k_t^T
    V_t = diag(exp(log_decay_t)) V_{t-1} + s_t v_t^T
    o_t = V_t^T softmax(K_t q_t)

The rows of K [M, K] and V [M, V] are slots, each with a decay of its own. The first pass, `slot_scores`, returns one
score per slot and token. The second pass is gated linear attention over the slots (ops/gla.py).

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G), K key dim, V value dim, M slots. The state is
[B, J, M, K + V], both memories, float32 (float64 for float64 inputs).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.ops.chunks import (
    chunks,
    grouped,
    scanned,
    segment_chunks,
    segment_masks,
    state_dtype,
    times,
    unchunked,
)
from linearize.ops.dispatch import run_kernel
from linearize.ops.gla import CHUNK, cumulative, decay_of_chunk, gla, intra_backward, intra_read, intra_scores


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
    """Compute both passes, by fla's kernel where that can serve these inputs.

    Autocast is off inside, so that the state stays float32.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V]. s, log_decay: as in `slot_scores`.
        initial_state: [B, J, M, K + V], zero when absent.
        segments: [B, T] document number of each token; the state is zeroed where it changes.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, M, K + V].
    """
    keywords: dict[str, Any] = {"initial_state": initial_state, "segments": segments}

    def kernel_inputs() -> list[Tensor]:
        return [k.to(q.dtype), v.to(q.dtype), s.to(q.dtype), log_decay.float()]

    with torch.autocast(q.device.type, enabled=False):
        result = run_kernel(
            "fla.ops.gsa", "chunk_gsa", q, kernel_inputs, adapt=_with_joined_state, scale=1.0, **keywords
        )
    if result is not None:
        output, state = result
        return output.to(v.dtype), state
    key_state = value_state = None
    if initial_state is not None:
        key_state, value_state = initial_state.split([k.shape[-1], v.shape[-1]], dim=-1)
    scores, key_state = slot_scores(q, k, s, log_decay, initial_state=key_state, segments=segments)
    output, value_state = gla(scores.softmax(-1), s, v, log_decay, initial_state=value_state, segments=segments)
    return output, torch.cat([key_state, value_state], dim=-1)


def _with_joined_state(kernel: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap fla's kernel so that its state is [M, K + V]. The kernel stores keys [K, M] and values [M, V] apart."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, initial_state: Tensor | None = None, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        pair = None
        if initial_state is not None:
            keys, values = initial_state.split([k.shape[-1], v.shape[-1]], dim=-1)
            pair = (keys.transpose(-1, -2), values)
        output, (keys, values) = kernel(q, k, v, *gates, initial_state=pair, **keywords)
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
    """Compute the scores of every query over the slots, in chunks. Every exponent is at most zero.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. s: [B, T, J, M], the weight of each slot in what a token writes.
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
        q_ = chunks(grouped(q, k).to(dtype) * scale, CHUNK)
        k_, s_, g_ = (chunks(x.to(dtype), CHUNK) for x in (k, s, log_decay))
        output, final = _ChunkedSlots.apply(q_, k_, s_, g_, state, segment_chunks(segments, CHUNK))
        return unchunked(output, T).to(s.dtype), final


class _ChunkedSlots(torch.autograd.Function):
    """Compute forward and backward over chunks.

    q is [B, J, N, C, G, K], k [B, J, N, C, K], s and g are [B, J, N, C, M]. Inside a chunk this is gated linear
    attention reversed: its forward is the backward of `intra_scores`, and its backward the forward.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, s: Tensor, g: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        b, b_end = cumulative(g)
        from_state, to_state, across, same = _slot_decays(b, b_end, segments, q.dtype)
        products = times((q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, q.shape[3:5]), same)
        increments = (s * to_state).transpose(-1, -2) @ k
        *scan, final = scanned(state, increments, across)
        states = torch.stack(scan, dim=2)
        read = (q.flatten(3, 4) @ states.transpose(-1, -2)).unflatten(3, q.shape[3:5])
        output = intra_read(products, s, b).addcmul_(read, from_state)
        ctx.save_for_backward(q, k, s, g, states, segments, products, output)
        return output, final

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, s, g, states, segments, products, output = ctx.saved_tensors
        b, b_end = cumulative(g)
        from_state, to_state, across, same = _slot_decays(b, b_end, segments, q.dtype)
        d_read = (d_output * from_state).flatten(3, 4)
        d_queries = d_read.transpose(-1, -2) @ q.flatten(3, 4)
        *d_later, d_state = scanned(d_state, d_queries, across, reverse=True)
        d_next = torch.stack(d_later[::-1], dim=2)  # of the state that leaves each chunk

        d_products = times(intra_scores(d_output, s, b), same).flatten(3, 4)
        dq = d_products @ k
        dq += d_read @ states
        dk = d_products.transpose(-1, -2) @ q.flatten(3, 4)
        dk += (s * to_state) @ d_next
        ds_out = (k @ d_next.transpose(-1, -2)) * to_state
        _, ds = intra_backward(d_output, s, b, products)
        ds += ds_out
        # b enters every term as +b with the output and as -b with s; see ops/gla.py
        db = (d_output * output).sum(4) - s * ds
        db_end = (s * ds_out).sum(-2) + (across * states * d_next).sum(-1)
        dg = db.flip(-2).cumsum(-2).flip(-2) + db_end.unsqueeze(-2)
        return dq.unflatten(3, q.shape[3:5]), dk, ds, dg, d_state, None


def _slot_decays(
    b: Tensor, b_end: Tensor, segments: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the decays of a chunk, all at most 1.

    Returns:
        from the entering state to each token [..., C, 1, M]; from each token to the leaving state [..., C, M]; across
        the chunk [..., M, 1]; 1 where two tokens share a document [..., C, 1, C], or None.
    """
    masks = segment_masks(segments, dtype)
    from_state, to_state, same = b.exp(), (b_end - b).exp(), None
    if masks is not None:
        from_state, to_state = from_state * masks.keep_in[..., None], to_state * masks.keep_out[..., None]
        same = masks.same[..., None, :]
    return from_state.unsqueeze(-2), to_state, decay_of_chunk(b_end, masks), same
