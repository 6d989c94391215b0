"""Gated linear attention (GLA) with one decay per head, or none.

RetNet (arXiv 2307.08621) and SSD (arXiv 2405.21060, section 6) have this form.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G, head h reads state h // G), K key dim, V value
dim. The state is [B, J, K, V], float32 (float64 for float64 inputs). Its naive twin is `gla_naive` with the decay
spread over the channels. `simple_gla_chunked` is the fast version; `simple_gla` chooses.
"""

from typing import Any

import torch
from torch import Tensor

from linearize.ops.chunks import carried, chunks, grouped, segment_chunks, segment_masks, state_dtype, times, unchunked
from linearize.ops.dispatch import run_kernel

# tokens per chunk
SIMPLE_CHUNK = 64


def simple_gla_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence in chunks of 64 tokens: a masked product inside each, one state between them.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V].
        log_decay: [B, T, J], at most zero; None forgets nothing.
        initial_state: [B, J, K, V], zero when absent.
        segments: [B, T] document number of each token; the state is zeroed where it changes.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, K, V].
    """
    dtype, T, (B, _, J, K), V = state_dtype(q), q.shape[1], k.shape, v.shape[-1]
    state = q.new_zeros(B, J, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if T == 0:
        return v.new_zeros(B, 0, q.shape[2], V), state
    q_ = grouped(q, k).to(dtype)
    q_ = chunks(q_ if scale == 1.0 else q_ * scale, SIMPLE_CHUNK)
    k_, v_ = (chunks(x.to(dtype), SIMPLE_CHUNK) for x in (k, v))
    b = None if log_decay is None else chunks(log_decay.to(dtype), SIMPLE_CHUNK).cumsum(-1)
    output, final = _ChunkedSimpleGLA.apply(q_, k_, v_, b, state, segment_chunks(segments, SIMPLE_CHUNK))
    return unchunked(output, T).to(v.dtype), final


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `simple_gla_chunked`, by fla's kernel where that can serve these inputs.

    Autocast is off inside, so that the state stays float32.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, K, V].
    """
    keywords: dict[str, Any] = {"scale": scale, "initial_state": initial_state, "segments": segments}

    def kernel_inputs() -> list[Tensor]:
        decays = [] if log_decay is None else [log_decay.float()]
        return [k.to(q.dtype), v.to(q.dtype), *decays]

    with torch.autocast(q.device.type, enabled=False):
        result = run_kernel("fla.ops.simple_gla", "chunk_simple_gla", q, kernel_inputs, **keywords)
        if result is None:  # no kernel for these inputs
            return simple_gla_chunked(q, k, v, log_decay, **keywords)
        output, state = result
        return output.to(v.dtype), state


class _ChunkedSimpleGLA(torch.autograd.Function):
    """Compute forward and backward over chunks.

    q is [B, J, N, C, G, K], k and v are [B, J, N, C, ·]. b [B, J, N, C] are the cumulative log-decays of each chunk, or
    None.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inside, reads, writes, carry = _decays(q, b, segments)
        scores = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, q.shape[3:5]).mul_(inside)
        increments = times(k, writes).transpose(-1, -2) @ v
        states, state = carried(state, increments, carry)
        output = scores.flatten(3, 4) @ v
        output += times(q, reads).flatten(3, 4) @ states
        ctx.save_for_backward(q, k, v, b, states, segments, scores)
        return output.unflatten(3, q.shape[3:5]), state

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, states, segments, scores = ctx.saved_tensors
        inside, reads, writes, carry = _decays(q, b, segments)
        d_output = d_output.flatten(3, 4)
        d_reads = times(q, reads).flatten(3, 4).transpose(-1, -2) @ d_output
        d_next, d_state = carried(d_state, d_reads.flip(2), None if carry is None else carry.flip(2))
        d_next = d_next.flip(2)

        dv = scores.flatten(3, 4).transpose(-1, -2) @ d_output
        dv += times(k, writes) @ d_next
        dk_out = times(v @ d_next.transpose(-1, -2), writes)
        d_scores = (d_output @ v.transpose(-1, -2)).unflatten(3, q.shape[3:5]).mul_(inside).flatten(3, 4)
        dq = (d_scores @ k).unflatten(3, q.shape[3:5])
        dk = d_scores.transpose(-1, -2) @ q.flatten(3, 4)
        dq += times((d_output @ states.transpose(-1, -2)).unflatten(3, q.shape[3:5]), reads)
        dk += dk_out
        if b is None or carry is None:
            return dq, dk, dv, None, d_state, None
        # b enters every term as +b with q and -b with k (2312.06635, C.2); its last value also with the leaving state
        db = (q * dq).sum((4, 5)) - (k * dk).sum(-1)
        db[..., -1] += (k * dk_out).sum((-1, -2)) + (carry * states * d_next).sum((-1, -2))
        return dq, dk, dv, db, d_state, None


def _decays(
    q: Tensor, b: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the decays of a chunk, all at most 1.

    Returns:
        between its tokens; from the entering state to each token; from each token to the leaving state; across the
        chunk. The last three are None where nothing is forgotten.
    """
    C = q.shape[3]
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    masks = segment_masks(segments, q.dtype)
    if b is None and masks is None:
        return causal.to(q.dtype)[:, None, :], None, None, None
    if b is None:
        inside = causal.to(q.dtype)
        reads, writes, carry = q.new_ones(()), q.new_ones(()), q.new_ones(())
    else:
        inside = (b[..., :, None] - b[..., None, :]).masked_fill_(~causal, float("-inf")).exp_()
        reads, writes, carry = b.exp(), (b[..., -1:] - b).exp(), b[..., -1].exp()
    if masks is not None:
        inside, carry = inside * masks.same, carry * masks.carry
        reads, writes = reads * masks.keep_in, writes * masks.keep_out
    return inside[..., :, None, :], reads[..., None, None], writes[..., None], carry[..., None, None]
