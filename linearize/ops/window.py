"""Softmax attention over a sliding window and a few sink keys, in time linear in the sequence.

Query t sees the `window` keys that end with its own, and those sink keys that have left its window, so that no key
counts twice. Sinks are the first tokens of a document (StreamingLLM, arXiv 2309.17453).

Shapes: B batch, T queries, S keys (the queries are the last T of the S tokens), H query heads, J key/value heads
(head h reads h // (H // J)), K head dim, V value dim, N sink keys, C queries per block.

`window_attention_naive` masks a [T, S] score matrix; `window_attention` works block by block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.softmax import fuses, softmax_attention

# queries per block: fewer waste fewer scores on keys out of reach, more keep the products large
MIN_BLOCK, MAX_BLOCK = 64, 1024
# kernels work on rows of scores in whole vectors; a row is padded to that with masked slots
VECTOR = 32


@dataclass(frozen=True)
class Scores:
    """The way from queries and keys to scores: s = scale q.k, then softcap tanh(s / softcap) (Gemma 2).

    Attributes:
        learned_sinks: [H], a score in every query's normaliser that no value belongs to (gpt-oss).
    """

    scale: float
    softcap: float | None = None
    learned_sinks: Tensor | None = None


@dataclass(frozen=True)
class SinkTokens:
    """The sinks beside a window.

    Attributes:
        keys, values: [B, N, J, K], [B, N, J, V].
        mask: [B or 1, T, N] bool, the sinks that each query sees; None for all of them.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def prepended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, S, J, ·] with the sinks' in front."""
        return torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)

    def unseen_by(self, queries: int) -> bool:
        """Return True if the first queries see no sink. Reading a device's mask waits for the device."""
        return self.mask is not None and not self.mask[:, :queries].any()


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
    """Compute attention over window and sinks by its definition, with a full score matrix.

    Args:
        q: [B, T, H, K]. k: [B, S, J, K]. v: [B, S, J, V].
        window: keys a query sees, itself included; at least 1.
        scale, softcap, learned_sinks: see `Scores`.
        key_mask: [B, S] bool, False for padding. A query always sees itself, so padded rows stay finite.
        segments: [B, S] document number of each key.
        sink_keys, sink_values, sink_mask: see `SinkTokens`.
        with_log_sum: also return log sum_j exp(score_j) over the visible keys and the learned sink.

    Returns:
        output [B, T, H, V]; log sum [B, T, H, 1] or None.
    """
    T, S = q.shape[1], k.shape[1]
    mask = _band(T, S, window, q.device)[None]
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    if segments is not None:
        mask = mask & (segments[:, S - T :, None] == segments[:, None, :])
    mask = mask | _band(T, S, 1, q.device)[None]
    mask = mask.expand(q.shape[0], -1, -1)
    if sink_keys is not None and sink_values is not None:
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
    """Compute `window_attention_naive` in time linear in the sequence.

    1. A single query that sees its whole window needs no mask.
    2. On a CPU, whole rows begin with causal attention for the queries whose window is not full yet.
    3. All other queries are computed block by block, against the keys that a block can reach.
    """
    T, S = q.shape[1], k.shape[1]
    window = min(window, S)
    scores = Scores(scale, softcap, learned_sinks)
    sinks = None
    if sink_keys is not None and sink_values is not None:
        sinks = SinkTokens(sink_keys, sink_values, sink_mask)
    if T == 1 and key_mask is None and segments is None and (sinks is None or sinks.mask is None):
        keys, values = k[:, -window:], v[:, -window:]
        if sinks is not None:
            keys, values = sinks.prepended(keys, values)
        return single_query_attention(q, keys, values, **vars(scores), with_log_sum=with_log_sum)
    whole_rows = T == S and key_mask is None and learned_sinks is None and q.device.type == "cpu"
    if not whole_rows or not fuses(q, softcap) or not (sinks is None or sinks.unseen_by(window)):
        return _blocked_attention(q, k, v, window, scores, key_mask, segments, sinks, with_log_sum)
    if window == T:
        return _causal_attention(q, k, v, scale, segments)
    documents = None if segments is None else segments[:, :window]
    early = _causal_attention(q[:, :window], k[:, :window], v[:, :window], scale, documents)
    late = window_attention(
        q[:, window:],
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
    output = torch.cat([early[0], late[0]], dim=1)
    return output, None if late[1] is None else torch.cat([early[1], late[1]], dim=1)


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
    """Compute attention of one query that sees every key, in whatever order the keys are.

    Args:
        q: [B, 1, H, K].
        k, v: [B, S, J, K], [B, S, J, V], sinks among them.
        scale, softcap, learned_sinks, with_log_sum: as in `window_attention_naive`.

    Returns:
        output [B, 1, H, V]; log sum [B, 1, H, 1] or None.
    """
    rows = q[:, 0].unflatten(1, (k.shape[2], -1))
    scores = Scores(scale, softcap, learned_sinks)
    output, log_sum = _attend_rows(rows, k.transpose(1, 2), v.transpose(1, 2), None, scores, with_log_sum)
    output = output.flatten(1, 2).unsqueeze(1)
    return output, None if log_sum is None else log_sum.flatten(1, 2).unsqueeze(1)


@dataclass(frozen=True)
class _Blocks:
    """The layout of queries and keys in blocks of `size` queries.

    Keys are padded to slots such that block i sees the slots [i size, i size + span), and row r of a block has its own
    key at slot r + window - 1 + i size. A single block leaves out the `skipped` slots before the first key.

    Attributes:
        size, count: C queries per block; blocks.
        span: key slots per block.
        front, back: padded slots before the first key and behind the last.
        behind: padded queries behind the last.
        skipped: slots left out of a single block.
        unreachable: leading keys that no query sees.
    """

    size: int
    count: int
    span: int
    front: int
    back: int
    behind: int
    skipped: int
    unreachable: int

    @classmethod
    def of(cls, queries: int, keys: int, window: int, size: int, sinks: int, on_device: bool) -> "_Blocks":
        """Lay out the last `queries` of `keys` tokens."""
        count = -(-queries // size)
        missing = window - 1 - (keys - queries)  # keys that the first window would have before the first key
        front = max(0, missing)
        skipped = front if count == 1 else 0
        span = size + window - 1 - skipped
        spare = -(span + sinks) % VECTOR if count > 1 or on_device else 0
        behind = count * size - queries
        return cls(size, count, span + spare, front - skipped, behind + spare, behind, skipped, max(0, -missing))

    def keys(self, x: Tensor) -> Tensor:
        """Cut keys, values or their mask into blocks: [B, S, ...] -> [B, blocks, span, ...]."""
        return _Windows.apply(_padded(x, self.front, self.back), self.span, self.size)

    def queries(self, x: Tensor) -> Tensor:
        """Cut queries or their masks into blocks: [B, T, ...] -> [B, blocks, C, ...]."""
        return _padded(x, 0, self.behind).unflatten(1, (self.count, self.size))

    def mask(self, queries: Tensor, window: int, key_mask: Tensor | None, segments: Tensor | None) -> Tensor:
        """Return the slots that each query [B, T, ...] sees, its own included: [B or 1, blocks, C, span] bool."""
        T, device = queries.shape[1], queries.device
        row = torch.arange(self.size, device=device)[:, None]
        slot = torch.arange(self.span, device=device)[None, :] + self.skipped
        band = (slot >= row) & (slot < row + window)
        start = (torch.arange(self.count, device=device) * self.size)[:, None, None]
        mask = (band & (start + slot - self.skipped >= self.front))[None]
        if key_mask is not None:
            mask = mask & self.keys(key_mask)[:, :, None, :]
        if segments is not None:
            padded = _padded(segments, self.front, self.back, -1)
            of_queries = padded[:, self.front + segments.shape[1] - T :][:, : self.count * self.size]
            of_queries = of_queries.unflatten(1, (self.count, self.size))
            mask = mask & (_Windows.apply(padded, self.span, self.size)[:, :, None, :] == of_queries[..., None])
        return mask | (slot == row + window - 1)

    def with_sinks(self, sinks: SinkTokens, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prepend the sinks to the span of every block, in keys, values and mask."""
        k, v = (
            torch.cat([sink[:, None].expand(-1, self.count, -1, -1, -1), x], dim=2)
            for sink, x in ((sinks.keys, k), (sinks.values, v))
        )
        N = sinks.keys.shape[1]
        if sinks.mask is None:
            return k, v, F.pad(mask, (N, 0), value=True)
        sink_mask = self.queries(sinks.mask)
        batch = max(mask.shape[0], sink_mask.shape[0])
        return k, v, torch.cat([sink_mask.expand(batch, -1, -1, N), mask.expand(batch, -1, -1, -1)], dim=-1)


def _blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scores: Scores,
    key_mask: Tensor | None,
    segments: Tensor | None,
    sinks: SinkTokens | None,
    with_log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute window attention for blocks of queries against the keys that they can reach."""
    B, T, H, _ = q.shape
    J, group = k.shape[2], H // k.shape[2]
    # a kernel that stores no scores pays little for keys out of reach, so its blocks may be larger
    size = MIN_BLOCK if with_log_sum and not fuses(q, scores.softcap) else max(MIN_BLOCK, min(window // 2, MAX_BLOCK))
    N = 0 if sinks is None else sinks.keys.shape[1]
    blocks = _Blocks.of(T, k.shape[1], window, min(T, size), N, q.is_cuda)
    if blocks.unreachable:
        k, v = k[:, blocks.unreachable :], v[:, blocks.unreachable :]
        key_mask, segments = (None if x is None else x[:, blocks.unreachable :] for x in (key_mask, segments))
    key_blocks, value_blocks = blocks.keys(k), blocks.keys(v)
    mask = blocks.mask(q, window, key_mask, segments)
    if sinks is not None and N:
        key_blocks, value_blocks, mask = blocks.with_sinks(sinks, key_blocks, value_blocks, mask)

    # the query group is folded into the rows, so that grouped heads share one copy of the keys
    rows = blocks.queries(q).unflatten(3, (J, group)).permute(0, 1, 3, 4, 2, 5)
    rows = rows.reshape(B * blocks.count, J, group * blocks.size, -1)
    bias = _bias(mask, q.dtype).expand(B, -1, -1, -1).flatten(0, 1)
    bias = bias[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
    key_rows, value_rows = (x.flatten(0, 1).transpose(1, 2) for x in (key_blocks, value_blocks))
    output, log_sum = _attend_rows(rows, key_rows, value_rows, bias, scores, with_log_sum)

    def unblocked(x: Tensor) -> Tensor:
        x = x.unflatten(0, (B, blocks.count)).unflatten(3, (group, blocks.size)).permute(0, 1, 4, 2, 3, 5)
        return x.reshape(B, blocks.count * blocks.size, H, -1)[:, :T]

    return unblocked(output), None if log_sum is None else unblocked(log_sum)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scores: Scores, with_log_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend from the rows of each block to its keys.

    Args:
        q: [blocks, J, R, K], the R rows of a block ordered by query head.
        k, v: [blocks, J, S, ·].
        bias: [blocks, 1, R, S], added to the scores, or None.

    Returns:
        output [blocks, J, R, V]; log sum [blocks, J, R, 1], or None unless it is asked for or computed anyway.
    """
    # scaled_dot_product_attention returns no normaliser and knows no softcap
    if not with_log_sum and scores.softcap is None and scores.learned_sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scores.scale), None
    output, log_sum = softmax_attention(q, k, v, bias, scale=scores.scale, softcap=scores.softcap)
    if scores.learned_sinks is not None:
        J, R = q.shape[1:3]
        column = scores.learned_sinks.to(log_sum.dtype).view(J, -1, 1)
        column = column.expand(-1, -1, R // column.shape[1]).reshape(J, R, 1)
        without, log_sum = log_sum, torch.logaddexp(log_sum, column)
        output = output * (without - log_sum).exp().to(output.dtype)
    return output, log_sum


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend from queries whose window is not full yet: each sees every key up to its own, and no sink."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    bias = None
    if segments is not None:
        bias = _bias(segments[:, None, :, None] == segments[:, None, None, :], q.dtype)
    output, log_sum = softmax_attention(q, k, v, bias, scale=scale, causal=True)
    return output.transpose(1, 2), log_sum.transpose(1, 2)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of a mask: 0 where it is True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _padded(x: Tensor, front: int, back: int, value: float = 0) -> Tensor:
    """Pad dimension 1 on both sides; return x itself where there is nothing to pad."""
    return F.pad(x, (*(0, 0) * (x.dim() - 2), front, back), value=value) if front or back else x


class _Windows(torch.autograd.Function):
    """Overlapping windows of dimension 1, as a view: [B, L, ...] -> [B, windows, span, ...], `step` apart.

    The gradients are added up window by window, several times as fast as those of `unfold`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, span: int, step: int) -> Tensor:
        ctx.shape, ctx.span, ctx.step = x.shape, span, step
        return x.unfold(1, span, step).movedim(-1, 2)

    @staticmethod
    def backward(ctx: Any, d_windows: Tensor) -> tuple[Tensor, None, None]:
        dx = d_windows.new_zeros(ctx.shape)
        for i, d_window in enumerate(d_windows.unbind(1)):
            dx[:, i * ctx.step : i * ctx.step + ctx.span] += d_window
        return dx, None, None


def _band(T: int, S: int, width: int, device: torch.device) -> Tensor:
    """Return [T, S] bool: keys at a distance from 0 to below `width` behind their query."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)[None, :]
    return (distance >= 0) & (distance < width)
