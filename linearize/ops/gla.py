"""Gated linear attention with a per-channel decay (GLA, arXiv 2312.06635, equations 3 and 4).

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G, head h reads state h // G), K key dim, V value
dim. The state is [B, J, K, V], float32 (float64 for float64 inputs). One state serves the whole query group, so
grouped-query models pay for J states, not H.

`gla_naive` is the definition; `gla_chunked` is the fast version with a hand-written backward; `gla` chooses.
"""

from typing import Any

import torch
from torch import Tensor

from linearize.ops.chunks import (
    SegmentMasks,
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

# tokens per chunk and per sub-chunk where decays are strong, and per chunk where they are mild
CHUNK = 32
SUBCHUNK = 4
MILD_CHUNK = 64
# largest exponent of a mild decay: exp(30) leaves float32 room for sums of products
MILD = 30.0


def gla_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence as a loop over tokens.

    Args:
        q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V].
        log_decay: [B, T, J, K], at most zero.
        initial_state: [B, J, K, V], zero when absent.
        segments: [B, T] document number of each token; the state is zeroed where it changes.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, K, V].
    """
    dtype = state_dtype(q)
    q_, k_, v_, decay = grouped(q, k).to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype).exp()
    B, T, J, K = k.shape
    state = q_.new_zeros(B, J, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1]).to(dtype)[:, None, None, None]
        state = decay[:, t, :, :, None] * state + k_[:, t, :, :, None] * v_[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bjgk,bjkv->bjgv", q_[:, t], state))
    output = torch.stack(outputs, dim=1) if T else q_.new_zeros(B, 0, J, q_.shape[3], v.shape[-1])
    return output.flatten(2, 3).to(v.dtype), state


def gla_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `gla_naive` in chunks of 64 or 32 tokens (arXiv 2312.06635, section 4).

    No decay overflows, however strong. Where the decays across a chunk are mild, queries and keys are scaled from its
    middle, by exponents of at most `MILD`. Elsewhere every exponent is a difference of cumulative log-decays, taken
    towards the past, and so at most zero.
    """
    dtype, T, (B, _, J, K), V = state_dtype(q), q.shape[1], k.shape, v.shape[-1]
    state = q.new_zeros(B, J, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if T == 0:
        return v.new_zeros(B, 0, q.shape[2], V), state
    q_ = grouped(q, k).to(dtype)
    q_ = q_ if scale == 1.0 else q_ * scale
    # [B, J, N, C, (G,) ·]: chunks are a batch dimension
    decays, size, operator = chunks(log_decay.to(dtype), MILD_CHUNK), MILD_CHUNK, _MildGLA.apply
    if not _is_mild(decays.cumsum(-2)):
        decays, size, operator = chunks(log_decay.to(dtype), CHUNK), CHUNK, _ChunkedGLA.apply
    q_, k_, v_ = (chunks(x.to(dtype), size) for x in (q_, k, v))
    output, final = operator(q_, k_, v_, decays, state, segment_chunks(segments, size))
    return unchunked(output, T).to(v.dtype), final


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `gla_naive`, by fla's kernel where that can serve these inputs, else by `gla_chunked`.

    Autocast is off inside, so that the state stays float32.

    Returns:
        output [B, T, H, V] in v's dtype, final state [B, J, K, V].
    """
    keywords: dict[str, Any] = {"scale": scale, "initial_state": initial_state, "segments": segments}

    def kernel_inputs() -> list[Tensor]:
        return [k.to(q.dtype), v.to(q.dtype), log_decay.float()]

    with torch.autocast(q.device.type, enabled=False):
        result = run_kernel("fla.ops.gla", "chunk_gla", q, kernel_inputs, **keywords)
        if result is None:  # no kernel for these inputs
            operator = gla_naive if q.shape[1] == 1 else gla_chunked
            return operator(q, k, v, log_decay, **keywords)
        output, state = result
        return output.to(v.dtype), state


class _MildGLA(torch.autograd.Function):
    """Compute chunks of mild decays as linear attention between q exp(b - r) and k exp(r - b).

    b are the cumulative log-decays. r lies halfway between the first and the last b of a chunk, and cancels everywhere.
    Shapes: see `_ChunkedGLA`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        b, b_end = cumulative(g)
        middle = 0.5 * (b[..., :1, :] + b_end)
        grow, shrink = _mild_scales(b, middle)
        # [..., K, 1]: from the entering state to the middle, from there to the leaving state, across
        enter, leave = (x.exp().transpose(-1, -2) for x in (middle, b_end - middle))
        masks = segment_masks(segments, q.dtype)
        decay, mask = decay_of_chunk(b_end, masks), _causal(b)
        keep_in = keep_out = None
        if masks is not None:
            keep_in, keep_out = masks.keep_in[..., None, None], masks.keep_out[..., None]
            mask = mask * masks.same[..., None, :]
        q, k = q * grow.unsqueeze(-2), k * shrink
        scores = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, q.shape[3:5]).mul_(mask)
        writes = (times(k, keep_out).transpose(-1, -2) @ v) * leave
        scan = scanned(state, writes, decay)
        final, states = scan[-1], torch.stack(scan, dim=2)
        output = scores.flatten(3, 4) @ v
        output += times(q, keep_in).flatten(3, 4) @ (enter * states[:, :, :-1])
        ctx.save_for_backward(q, k, v, grow, shrink, enter, leave, decay, states, scores, mask, keep_in, keep_out)
        return output.unflatten(3, q.shape[3:5]), final

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, grow, shrink, enter, leave, decay, states, scores, mask, keep_in, keep_out = ctx.saved_tensors
        d_output = d_output.flatten(3, 4)
        d_reads = (times(q, keep_in).flatten(3, 4).transpose(-1, -2) @ d_output) * enter
        *d_later, d_state = scanned(d_state, d_reads, decay, reverse=True)
        d_next = torch.stack(d_later[::-1], dim=2)  # of the state that leaves each chunk
        d_writes = leave * d_next

        dv = scores.flatten(3, 4).transpose(-1, -2) @ d_output
        dv += times(k, keep_out) @ d_writes
        d_scores = (d_output @ v.transpose(-1, -2)).unflatten(3, q.shape[3:5]).mul_(mask).flatten(3, 4)
        dq = (d_scores @ k).unflatten(3, q.shape[3:5])
        dk = d_scores.transpose(-1, -2) @ q.flatten(3, 4)
        read = d_output @ (enter * states[:, :, :-1]).transpose(-1, -2)
        dq += times(read.unflatten(3, q.shape[3:5]), keep_in)
        dk += times(v @ d_writes.transpose(-1, -2), keep_out)

        # b enters as +b with q and as -b with k; its last value as +b with the leaving state
        db = (q * dq).sum(4) - k * dk
        dg = db.flip(-2).cumsum(-2).flip(-2) + (states[:, :, 1:] * d_next).sum(-1).unsqueeze(-2)
        return dq.mul_(grow.unsqueeze(-2)), dk.mul_(shrink), dv, dg, d_state, None


class _ChunkedGLA(torch.autograd.Function):
    """Compute forward and backward over chunks; see `gla_chunked`.

    q is [B, J, N, C, G, K], k v g are [B, J, N, C, ·]. Rows and group are adjacent, so that flattening the two, which
    every product does, copies nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        b, b_end = cumulative(g)
        masks = segment_masks(segments, q.dtype)
        scores = intra_scores(q, k, b)
        q_in, k_out, decay = q * b.exp()[..., None, :], k * (b_end - b).exp(), decay_of_chunk(b_end, masks)
        if masks is not None:
            scores = scores * masks.same[..., None, :]
            q_in, k_out = q_in * masks.keep_in[..., None, None], k_out * masks.keep_out[..., None]
        writes = k_out.transpose(-1, -2) @ v
        *scan, final = scanned(state, writes, decay)
        states = torch.stack(scan, dim=2)
        output = scores.flatten(3, 4) @ v
        output += q_in.flatten(3, 4) @ states
        ctx.save_for_backward(q, k, v, g, states, segments, scores)
        return output.unflatten(3, q.shape[3:5]), final

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, states, segments, scores = ctx.saved_tensors
        b, b_end = cumulative(g)
        masks = segment_masks(segments, q.dtype)
        in_decay, out_decay, decay = b.exp(), (b_end - b).exp(), decay_of_chunk(b_end, masks)
        if masks is not None:
            in_decay, out_decay = in_decay * masks.keep_in[..., None], out_decay * masks.keep_out[..., None]
        in_decay = in_decay[..., None, :]
        d_output = d_output.flatten(3, 4)

        # [B, J, N, K, V]: gradients of each chunk's entering state from its own queries, all groups at once
        d_reads = (q * in_decay).flatten(3, 4).transpose(-1, -2) @ d_output
        *d_later, d_state = scanned(d_state, d_reads, decay, reverse=True)
        d_next = torch.stack(d_later[::-1], dim=2)  # of the state that leaves each chunk

        dv = scores.flatten(3, 4).transpose(-1, -2) @ d_output
        dv += (k * out_decay) @ d_next
        dk_out = (v @ d_next.transpose(-1, -2)) * out_decay
        d_scores = (d_output @ v.transpose(-1, -2)).unflatten(3, q.shape[3:5])
        if masks is not None:
            d_scores *= masks.same[..., None, :]
        dq, dk = intra_backward(q, k, b, d_scores)
        dq += (d_output @ states.transpose(-1, -2)).unflatten(3, q.shape[3:5]) * in_decay
        dk += dk_out

        # b enters every term as +b with q and -b with k, so its gradient needs no further products (2312.06635, C.2)
        db = (q * dq).sum(4) - k * dk
        db_end = (k * dk_out).sum(-2) + (decay * states * d_next).sum(-1)
        dg = db.flip(-2).cumsum(-2).flip(-2) + db_end.unsqueeze(-2)
        return dq, dk, dv, dg, d_state, None


class DecayedScores(torch.autograd.Function):
    """A_ij = sum_K q_i k_j exp(b_i - b_j) for j <= i in every chunk, zero above, with b the cumulative log-decays.

    q is [B, J, N, C, G, K], k and b are [B, J, N, C, K] with C = CHUNK; the result is [B, J, N, C, G, C].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, b)
        return intra_scores(q, k, b)

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, b = ctx.saved_tensors
        dq, dk = intra_backward(q, k, b, d_scores)
        return dq, dk, (q * dq).sum(4) - k * dk


def intra_scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Compute A_ij = sum_K q_i k_j exp(b_i - b_j) for j <= i inside a chunk: [B, J, N, C, G, C].

    Rows are computed one sub-chunk at a time. Keys of earlier sub-chunks are decayed to its first token; inside it the
    differences are formed directly.
    """
    if (scales := _scales_where_mild(b)) is not None:
        grow, shrink = scales
        grown = (q * grow[..., None, :]).flatten(3, 4)
        scores = grown @ (k * shrink).transpose(-1, -2)
        return scores.unflatten(3, q.shape[3:5]).mul_(_causal(b))
    scores = q.new_zeros(*q.shape[:-1], CHUNK)
    flat = scores.flatten(3, 4)
    G = q.shape[4]
    for start in range(0, CHUNK, SUBCHUNK):
        rows, past = slice(start, start + SUBCHUNK), slice(0, start)
        if start:
            row_decay, past_decay = _decay_between(b, rows, past)
            q_rows = (q[..., rows, :, :] * row_decay).flatten(3, 4)
            k_past = k[..., past, :] * past_decay
            flat[..., G * start : G * (start + SUBCHUNK), past] = q_rows @ k_past.transpose(-1, -2)
        # [B, J, N, c, c, K], then one product per row over all query groups
        k_inside = _decay_inside(b, rows) * k[..., None, rows, :]
        scores[..., rows, :, rows] = q[..., rows, :, :] @ k_inside.transpose(-1, -2)
    return scores


def intra_backward(q: Tensor, k: Tensor, b: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `intra_scores` with respect to q and k, from which that of b follows."""
    if (scales := _scales_where_mild(b)) is not None:
        grow, shrink = scales
        grow = grow[..., None, :]
        d_scores = (d_scores * _causal(b)).flatten(3, 4)
        dk = (d_scores.transpose(-1, -2) @ (q * grow).flatten(3, 4)) * shrink
        return (d_scores @ (k * shrink)).unflatten(3, q.shape[3:5]) * grow, dk
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for start in range(0, CHUNK, SUBCHUNK):
        rows, past = slice(start, start + SUBCHUNK), slice(0, start)
        q_rows, decay = q[..., rows, :, :], _decay_inside(b, rows)
        # [B, J, N, c (row), G, c (column)]
        inside = d_scores[..., rows, :, rows]
        dq_rows = inside @ (decay * k[..., None, rows, :])
        dk[..., rows, :] += ((inside.transpose(-1, -2) @ q_rows) * decay).sum(3)
        if start:
            row_decay, past_decay = _decay_between(b, rows, past)
            block = d_scores[..., rows, :, past].flatten(3, 4)
            dq_rows += (block @ (k[..., past, :] * past_decay)).unflatten(3, q_rows.shape[3:5]) * row_decay
            dk[..., past, :] += (block.transpose(-1, -2) @ (q_rows * row_decay).flatten(3, 4)) * past_decay
        dq[..., rows, :, :] = dq_rows
    return dq, dk


def intra_read(scores: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Compute sum_j A_ij k_j exp(b_i - b_j) over j <= i inside a chunk.

    Args:
        scores: A, [B, J, N, C, G, C].
        k, b: [B, J, N, C, K].

    Returns:
        [B, J, N, C, G, K].
    """
    if (scales := _scales_where_mild(b)) is not None:
        grow, shrink = scales
        read = (scores * _causal(b)).flatten(3, 4) @ (k * shrink)
        return read.unflatten(3, scores.shape[3:5]) * grow[..., None, :]
    output = scores.new_empty(*scores.shape[:-1], k.shape[-1])
    for start in range(0, CHUNK, SUBCHUNK):
        rows, past = slice(start, start + SUBCHUNK), slice(0, start)
        read = scores[..., rows, :, rows] @ (_decay_inside(b, rows) * k[..., None, rows, :])
        if start:
            row_decay, past_decay = _decay_between(b, rows, past)
            far = scores[..., rows, :, past].flatten(3, 4) @ (k[..., past, :] * past_decay)
            read += far.unflatten(3, read.shape[3:5]) * row_decay
        output[..., rows, :, :] = read
    return output


def _is_mild(b: Tensor) -> bool:
    """Return True if exponents of at most `MILD` reach from every chunk's middle to its ends."""
    return b.numel() > 0 and bool((b[..., 0, :] - b[..., -1, :]).max() < 2 * MILD)


def _mild_scales(b: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(b - middle) and exp(middle - b)."""
    grow = (b - middle).exp_()
    return grow, 1.0 / grow


def _scales_where_mild(b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the two scales of `_mild_scales` from each chunk's middle if all decays are mild, else None."""
    return _mild_scales(b, 0.5 * (b[..., :1, :] + b[..., -1:, :])) if _is_mild(b) else None


def _causal(b: Tensor) -> Tensor:
    """Return [C, 1, C]: 1 where row i of a chunk sees column j <= i."""
    return torch.ones(b.shape[-2], b.shape[-2], dtype=b.dtype, device=b.device).tril()[:, None, :]


def _decay_between(b: Tensor, rows: slice, past: slice) -> tuple[Tensor, Tensor]:
    """Return the decays on both sides of the last token before `rows`, all at most 1.

    Returns:
        from that token to each row [..., c, 1, K]; from each past token to that token.
    """
    reference = b[..., rows.start - 1 : rows.start, :]
    return (b[..., rows, :] - reference).exp_()[..., None, :], (reference - b[..., past, :]).exp_()


def _decay_inside(b: Tensor, rows: slice) -> Tensor:
    """Return exp(b_i - b_j) for j <= i and zero above, inside one sub-chunk: [B, J, N, c, c, K]."""
    difference = b[..., rows, None, :] - b[..., None, rows, :]
    later = torch.ones(SUBCHUNK, SUBCHUNK, dtype=torch.bool, device=b.device).triu(1)
    return difference.masked_fill_(later[..., None], float("-inf")).exp_()


def decay_of_chunk(b_end: Tensor, masks: SegmentMasks | None) -> Tensor:
    """Return the decay of the entering state across a whole chunk: [B, J, N, K, 1]."""
    decay = b_end.squeeze(-2).exp().unsqueeze(-1)
    return decay if masks is None else decay * masks.carry[..., None, None]


def cumulative(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative log-decays of each chunk, and the last of them."""
    b = g.cumsum(-2)
    return b, b[..., -1:, :]
