"""Softmax attention over a sliding window and a few sink keys, in time linear in the sequence.

Query t sees the `window` keys ending with its own (itself included) and, of the sink keys, those that have left
its window, so no key is counted twice. Sinks are the first tokens of a document (StreamingLLM, arXiv 2309.17453).

Shapes: B batch, T queries, S keys (S = T + cached, the queries are the last T), H query heads, J key/value heads
(head h reads h // (H // J)), K head dim, V value dim, N sink keys.

`window_attention_naive` masks a [T, S] score matrix; `window_attention` works block by block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.softmax import fuses, softmax_attention

MIN_BLOCK, MAX_BLOCK = 64, 1024
# kernels work on rows of scores in whole vectors; what lacks to that is masked
VECTOR = 32


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys: s = scale q.k, then softcap tanh(s / softcap) (Gemma 2).

    Attributes:
        learned_sinks: [H], a score in every query's normaliser that no value belongs to (gpt-oss).
    """

    scale: float
    softcap: float | None = None
    learned_sinks: Tensor | None = None


def window_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    learned_sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
    sink_keys: Tensor | None = None,
    sink_values: Tensor | None = None,
    sink_mask: Tensor | None = None,
    with_log_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, with a full score matrix.

    Args:
        q: [B, T, H, K]. k: [B, S, J, K]. v: [B, S, J, V].
        window: keys a query sees, itself included; at least 1.
        scale, softcap, learned_sinks: see `Scores`.
        key_mask: [B, S] bool, False for padding. A query always sees itself, so padded rows stay finite.
        segments: [B, S] document number of each key (the last T belong to the queries).
        sink_keys, sink_values: [B, N, J, K], [B, N, J, V].
        sink_mask: [B, T, N] bool, which sink each query sees; None for all of them.
        with_log_sum: whether log sum_j exp(score_j) over the visible keys and the learned sink is wanted too.

    Returns:
        output [B, T, H, V], and [B, T, H, 1] or None.
    """
    T, S = q.shape[1], k.shape[1]
    mask = _band(T, S, window, q.device)[None]
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    if segments is not None:
        mask = mask & (segments[:, S - T :, None] == segments[:, None, :])
    mask = mask | _band(T, S, 1, q.device)[None]
    mask = mask.expand(q.shape[0], -1, -1)
    if sink_keys is not None:
        k, v = torch.cat([sink_keys, k], dim=1), torch.cat([sink_values, v], dim=1)
        if sink_mask is None:
            sink_mask = mask.new_ones(1, T, sink_keys.shape[1])
        mask = torch.cat([sink_mask.expand(q.shape[0], -1, -1), mask], dim=-1)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if learned_sinks is not None:
        column = learned_sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    log_sum = scores.logsumexp(-1, keepdim=True).transpose(1, 2) if with_log_sum else None
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1)[..., : k.shape[1]], v), log_sum


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    learned_sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
    sink_keys: Tensor | None = None,
    sink_values: Tensor | None = None,
    sink_mask: Tensor | None = None,
    with_log_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same function as `window_attention_naive`, computed for blocks of queries against the keys they can see."""
    B, T, H, _ = q.shape
    S, J = k.shape[1], k.shape[2]
    window = min(window, S)
    if T == 1 and key_mask is None and segments is None and (sink_keys is None or sink_mask is None):
        keys, values = k[:, -window:], v[:, -window:]
        if sink_keys is not None:
            keys, values = torch.cat([sink_keys, keys], dim=1), torch.cat([sink_values, values], dim=1)
        return single_query_attention(
            q, keys, values, scale=scale, softcap=softcap, learned_sinks=learned_sinks, with_log_sum=with_log_sum
        )
    whole = T == S and key_mask is None and learned_sinks is None and q.device.type == "cpu"
    if whole and fuses(q, softcap) and (sink_keys is None or _none_seen(sink_mask, window)):
        if window >= T:
            return _causal_attention(q, k, v, scale, segments)
        first, rest = q.split([window, T - window], dim=1)
        documents = None if segments is None else segments[:, :window]
        early = _causal_attention(first, k[:, :window], v[:, :window], scale, documents)
        late = window_attention(
            rest,
            k,
            v,
            window=window,
            scale=scale,
            segments=segments,
            sink_keys=sink_keys,
            sink_values=sink_values,
            sink_mask=None if sink_mask is None else sink_mask[:, window:],
            with_log_sum=with_log_sum,
        )
        output, log_sum = (None if y is None else torch.cat([x, y], dim=1) for x, y in zip(early, late))
        return output, log_sum
    # fewer queries a block waste fewer scores on keys out of reach; where no scores are kept, larger ones pay
    C = min(T, MIN_BLOCK if with_log_sum and not fuses(q, softcap) else max(MIN_BLOCK, min(window // 2, MAX_BLOCK)))
    blocks = -(-T // C)
    span = C + window - 1
    # Keys are laid out so that block i sees slots [i C, i C + span): front slots that do not exist are masked.
    front, behind = window - 1 - (S - T), blocks * C - T
    if front < 0:
        k, v = k[:, -front:], v[:, -front:]
        key_mask = None if key_mask is None else key_mask[:, -front:]
        segments = None if segments is None else segments[:, -front:]
        front = 0
    # a single block needs no slots before the first key
    skip = front if blocks == 1 else 0
    front, span = front - skip, span - skip
    N = 0 if sink_keys is None else sink_keys.shape[1]
    spare = -(span + N) % VECTOR if blocks > 1 or q.is_cuda else 0
    span, back = span + spare, behind + spare

    key_blocks, value_blocks = (_windows(_padded(x, front, back), span, C) for x in (k, v))
    row = torch.arange(C, device=q.device)[:, None]
    slot = torch.arange(span, device=q.device)[None, :] + skip
    band = (slot >= row) & (slot < row + window)
    itself = slot == row + window - 1
    start = (torch.arange(blocks, device=q.device) * C)[:, None, None]
    mask = (band & (start + slot - skip >= front))[None]
    if key_mask is not None:
        mask = mask & _windows(_padded(key_mask, front, back), span, C)[:, :, None, :]
    if segments is not None:
        key_segments = _padded(segments, front, back, -1)
        query_segments = key_segments[:, front + segments.shape[1] - T :][:, : blocks * C].unflatten(1, (blocks, C))
        mask = mask & (_windows(key_segments, span, C)[:, :, None, :] == query_segments[..., None])
    mask = mask | itself
    if N:
        key_blocks, value_blocks = (
            torch.cat([sink[:, None].expand(-1, blocks, -1, -1, -1), x], dim=2)
            for sink, x in ((sink_keys, key_blocks), (sink_values, value_blocks))
        )
        if sink_mask is None:
            mask = F.pad(mask, (N, 0), value=True)
        else:
            sinks = _padded(sink_mask, 0, behind).unflatten(1, (blocks, C))
            batch = max(mask.shape[0], sinks.shape[0])
            mask = torch.cat([sinks.expand(batch, -1, -1, N), mask.expand(batch, -1, -1, -1)], dim=-1)

    # the query group is folded into the rows, so that grouped heads share one copy of the keys
    group = H // J
    rows = _padded(q, 0, behind).unflatten(1, (blocks, C)).unflatten(3, (J, group))
    rows = rows.permute(0, 1, 3, 4, 2, 5).reshape(B * blocks, J, group * C, -1)
    bias = _bias(mask, q.dtype).expand(B, -1, -1, -1).flatten(0, 1)
    bias = bias[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
    key_rows, value_rows = (x.flatten(0, 1).transpose(1, 2) for x in (key_blocks, value_blocks))
    output, log_sum = _attention(rows, key_rows, value_rows, bias, scale, softcap, learned_sinks, with_log_sum)

    def unblocked(x: Tensor) -> Tensor:
        x = x.unflatten(0, (B, blocks)).unflatten(3, (group, C)).permute(0, 1, 4, 2, 3, 5)
        return x.reshape(B, blocks * C, H, -1)[:, :T]

    return unblocked(output), None if log_sum is None else unblocked(log_sum)


def single_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    learned_sinks: Tensor | None = None,
    with_log_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same function for one query that sees every key, in whatever order they are.

    Args:
        q: [B, 1, H, K]. k: [B, S, J, K]. v: [B, S, J, V], sinks among them.
        scale, softcap, learned_sinks, with_log_sum: as in `window_attention_naive`.

    Returns:
        output [B, 1, H, V], and [B, 1, H, 1] or None.
    """
    rows = q[:, 0].unflatten(1, (k.shape[2], -1))
    output, log_sum = _attention(
        rows, k.transpose(1, 2), v.transpose(1, 2), None, scale, softcap, learned_sinks, with_log_sum
    )
    return tuple(None if x is None else x.flatten(1, 2).unsqueeze(1) for x in (output, log_sum))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    learned_sinks: Tensor | None,
    with_log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of rows against their keys: q [N, J, R, K], the rows of a block grouped by query head, k and v [N, J, S, ·],
    bias [N, 1, R, S] or None. Returns output [N, J, R, V], and if asked for the normaliser's logarithm, [N, J, R, 1]."""
    # scaled_dot_product_attention keeps the normaliser to itself and knows no softcap
    if not with_log_sum and softcap is None and learned_sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    output, log_sum = softmax_attention(q, k, v, bias, scale=scale, softcap=softcap)
    if learned_sinks is not None:
        J, R = q.shape[1:3]
        column = learned_sinks.to(log_sum.dtype).view(J, -1, 1)
        column = column.expand(-1, -1, R // column.shape[1]).reshape(J, R, 1)
        without, log_sum = log_sum, torch.logaddexp(log_sum, column)
        output = output * (without - log_sum).exp().to(output.dtype)
    return output, log_sum


def _none_seen(sink_mask: Tensor | None, queries: int) -> bool:
    """Whether the first queries see no sink. To ask a device is to wait for it."""
    return sink_mask is not None and not sink_mask[:, :queries].any()


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: 0 where True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries before the window is full: each sees every key up to its own, and no sink has left its window."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    bias = None
    if segments is not None:
        bias = _bias(segments[:, None, :, None] == segments[:, None, None, :], q.dtype)
    output, log_sum = softmax_attention(q, k, v, bias, scale=scale, causal=True)
    return output.transpose(1, 2), log_sum.transpose(1, 2)


def _padded(x: Tensor, front: int, behind: int, value: float = 0) -> Tensor:
    """More tokens, dimension 1, on both sides; x itself where there are none to add."""
    return F.pad(x, (*(0, 0) * (x.dim() - 2), front, behind), value=value) if front or behind else x


def _windows(x: Tensor, span: int, step: int) -> Tensor:
    """Overlapping stretches of dimension 1: [B, L, ...] -> [B, blocks, span, ...] (a view)."""
    return _Windows.apply(x, span, step)


class _Windows(torch.autograd.Function):
    """Gradients add up stretch by stretch, several times as fast as those of `unfold`."""

    @staticmethod
    def forward(ctx, x, span, step):
        ctx.shape, ctx.span, ctx.step = x.shape, span, step
        return x.unfold(1, span, step).movedim(-1, 2)

    @staticmethod
    def backward(ctx, d_windows):
        dx = d_windows.new_zeros(ctx.shape)
        for i, d_window in enumerate(d_windows.unbind(1)):
            dx[:, i * ctx.step : i * ctx.step + ctx.span] += d_window
        return dx, None, None


def _band(T: int, S: int, width: int, device) -> Tensor:
    """[T, S] bool: keys at distance 0 <= d < width behind the query, queries being the last T of the S slots."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)[None, :]
    return (distance >= 0) & (distance < width)
