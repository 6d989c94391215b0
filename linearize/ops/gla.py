"""Gated linear attention with a per-channel decay (GLA, arXiv 2312.06635, equations 3 and 4).

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G, head h reads state h // G),
K key dim, V value dim. The state is [B, J, K, V] and always float32 (float64 for float64 inputs): one state
serves the whole query group, so grouped-query models pay for J states, not H.

`gla_naive` is the definition; `gla_chunked` is the fast version with a hand-written backward; `gla` dispatches.
"""

import torch
from torch import Tensor

from linearize.ops.chunks import chunks, grouped, segment_chunks, segment_masks, state_dtype, unchunked
from linearize.ops.dispatch import run_kernel

CHUNK = 32
SUBCHUNK = 4
# the largest exponent that is safe in float32 with room for sums of products
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
    """The recurrence as a loop over tokens.

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
    """The same function as `gla_naive`, in chunks of 32 tokens (arXiv 2312.06635, section 4).

    No gate, however strong, overflows: where decays across a chunk are mild, queries and keys are scaled from its middle,
    by exponents of at most `MILD`; elsewhere every exponent is a difference of cumulative log-decays taken towards the
    past, hence at most zero.
    """
    dtype = state_dtype(q)
    T, (B, _, J, K), V = q.shape[1], k.shape, v.shape[-1]
    if T == 0:
        state = q.new_zeros(B, J, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        return v.new_zeros(B, 0, q.shape[2], V), state
    # [B, J, N, C, (G,) ·]: chunks are a batch dimension
    q_ = chunks(grouped(q, k).to(dtype) * scale, CHUNK)
    k_, v_, g_ = (chunks(x.to(dtype), CHUNK) for x in (k, v, log_decay))
    state = q_.new_zeros(B, J, K, V) if initial_state is None else initial_state.to(dtype)
    output, final = _ChunkedGLA.apply(q_, k_, v_, g_, state, segment_chunks(segments, CHUNK))
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
    """Gated linear attention by the fastest operator available for these inputs. See `gla_naive`.

    Autocast does not reach inside: the state stays float32.
    """
    keywords = {"scale": scale, "initial_state": initial_state, "segments": segments}
    with torch.autocast(q.device.type, enabled=False):
        ran = run_kernel(
            "fla.ops.gla", "chunk_gla", q, lambda: [k.to(q.dtype), v.to(q.dtype), log_decay.float()], **keywords
        )
        if ran is None:
            operator = gla_naive if q.shape[1] == 1 else gla_chunked
            return operator(q, k, v, log_decay, **keywords)
        return ran[0].to(v.dtype), ran[1]


class _ChunkedGLA(torch.autograd.Function):
    """Forward and backward over chunks; see `gla_chunked`.

    q is [B, J, N, C, G, K], k v g are [B, J, N, C, ·]. Rows and group are adjacent, so that flattening the two, which
    every product does, copies nothing.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, state, segments):
        b, b_end = cumulative(g)
        keep_in, keep_out, carry, same = segment_masks(segments, q.dtype)
        scores = intra_scores(q, k, b)
        if same is not None:
            scores = scores * same[..., None, :]
        q_in, k_out, decay = q * b.exp()[..., None, :], k * (b_end - b).exp(), decay_of_chunk(b_end, carry)
        if segments is not None:
            q_in, k_out = q_in * keep_in[..., None, None], k_out * keep_out[..., None]
        writes = k_out.transpose(-1, -2) @ v
        states = []
        for n in range(q.shape[2]):
            states.append(state)
            state = torch.addcmul(writes[:, :, n], decay[:, :, n], state)
        states = torch.stack(states, dim=2)
        output = scores.flatten(3, 4) @ v
        output += q_in.flatten(3, 4) @ states
        ctx.save_for_backward(q, k, v, g, states, segments, scores)
        return output.unflatten(3, q.shape[3:5]), state

    @staticmethod
    def backward(ctx, d_output, d_state):
        q, k, v, g, states, segments, scores = ctx.saved_tensors
        b, b_end = cumulative(g)
        keep_in, keep_out, carry, same = segment_masks(segments, q.dtype)
        in_decay, out_decay, decay = b.exp(), (b_end - b).exp(), decay_of_chunk(b_end, carry)
        if segments is not None:
            in_decay, out_decay = in_decay * keep_in[..., None], out_decay * keep_out[..., None]
        in_decay = in_decay[..., None, :]
        d_output = d_output.flatten(3, 4)

        # [B, J, N, K, V]: what each chunk's entering state receives from its own queries, all groups at once
        d_reads = (q * in_decay).flatten(3, 4).transpose(-1, -2) @ d_output
        d_next = []
        for n in reversed(range(q.shape[2])):
            d_next.append(d_state)
            d_state = torch.addcmul(d_reads[:, :, n], decay[:, :, n], d_state)
        d_next = torch.stack(d_next[::-1], dim=2)

        dv = scores.flatten(3, 4).transpose(-1, -2) @ d_output
        dv += (k * out_decay) @ d_next
        dk_out = (v @ d_next.transpose(-1, -2)) * out_decay
        d_scores = (d_output @ v.transpose(-1, -2)).unflatten(3, q.shape[3:5])
        if same is not None:
            d_scores *= same[..., None, :]
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
    def forward(ctx, q, k, b):
        ctx.save_for_backward(q, k, b)
        return intra_scores(q, k, b)

    @staticmethod
    def backward(ctx, d_scores):
        q, k, b = ctx.saved_tensors
        dq, dk = intra_backward(q, k, b, d_scores)
        return dq, dk, (q * dq).sum(4) - k * dk


def intra_scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """A_ij = sum_K q_i k_j exp(b_i - b_j) for j <= i inside a chunk: [B, J, N, C, G, C].

    Rows are taken a sub-chunk at a time. Earlier sub-chunks meet it through the decay at its first token; inside
    it the differences are formed directly.
    """
    if (scales := _mild_scales(b)) is not None:
        grown = (q * scales[0][..., None, :]).flatten(3, 4)
        scores = grown @ (k * scales[1]).transpose(-1, -2)
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
    """Gradients of `intra_scores` with respect to q and k (b follows from them)."""
    if (scales := _mild_scales(b)) is not None:
        grow, shrink = scales[0][..., None, :], scales[1]
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
    """sum_j A_ij k_j exp(b_i - b_j) over j <= i inside a chunk: scores [B, J, N, C, G, C], k and b [B, J, N, C, K] ->
    [B, J, N, C, G, K]."""
    if (scales := _mild_scales(b)) is not None:
        read = (scores * _causal(b)).flatten(3, 4) @ (k * scales[1])
        return read.unflatten(3, scores.shape[3:5]) * scales[0][..., None, :]
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


def _mild_scales(b: Tensor) -> tuple[Tensor, Tensor] | None:
    """exp(b - r) and exp(r - b), with r half way between a chunk's first and last b, unless some decay is too strong."""
    first, last = b[..., :1, :], b[..., -1:, :]
    if b.numel() == 0 or not (first - last).max() < 2 * MILD:
        return None
    grow = (b - 0.5 * (first + last)).exp_()
    return grow, 1.0 / grow


def _causal(b: Tensor) -> Tensor:
    """[C, 1, C]: 1 where row i sees column j <= i."""
    return torch.ones(CHUNK, CHUNK, dtype=b.dtype, device=b.device).tril()[:, None, :]


def _decay_between(b: Tensor, rows: slice, past: slice) -> tuple[Tensor, Tensor]:
    """Decay from the last token before `rows` to each row, and from each past token to it; both at most one."""
    reference = b[..., rows.start - 1 : rows.start, :]
    return (b[..., rows, :] - reference).exp_()[..., None, :], (reference - b[..., past, :]).exp_()


def _decay_inside(b: Tensor, rows: slice) -> Tensor:
    """exp(b_i - b_j) for j <= i and zero above, inside one sub-chunk: [B, J, N, c, c, K]."""
    difference = b[..., rows, None, :] - b[..., None, rows, :]
    later = torch.ones(SUBCHUNK, SUBCHUNK, dtype=torch.bool, device=b.device).triu(1)
    return difference.masked_fill_(later[..., None], float("-inf")).exp_()


def decay_of_chunk(b_end: Tensor, carry: Tensor | None) -> Tensor:
    """What a whole chunk leaves of the entering state: [B, J, N, K, 1]."""
    decay = b_end.squeeze(-2).exp().unsqueeze(-1)
    return decay if carry is None else decay * carry[..., None, None]


def cumulative(g: Tensor) -> tuple[Tensor, Tensor]:
    b = g.cumsum(-2)
    return b, b[..., -1:, :]
