"""The keys and values that the queries of a window see.

A slot is a position in the padded row, counted from the first token of the cache. An ordinal is a token's number
within its document, -1 for padding. Left-padded rows share slots but not ordinals.

Shapes: B batch, T queries, S slots, J key/value heads, K head dim, N sink keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.mixers.mixer import RecurrentInputs


class Slots(NamedTuple):
    """The keys and values [B, n, J, K] of n slots, their recurrent inputs, and the rest [B, n] as in `Context`."""

    keys: Tensor
    values: Tensor
    recurrent_inputs: RecurrentInputs
    ordinals: Tensor | None = None
    key_mask: Tensor | None = None
    segments: Tensor | None = None
    is_new: Tensor | None = None


@dataclass
class Context:
    """The keys and values in reach of T queries, which are those of its last T slots.

    Attributes:
        keys, values: [B, S, J, K], keys after rotary.
        recurrent_inputs: the other inputs of the recurrent branch, of all S slots or of the newest alone.
        ordinals: [B or 1, S] int64.
        key_mask: [B, S] bool, False for padding; None without padding.
        segments: [B, S] document numbers; None for one document.
        is_new: [B, S] bool, True for the tokens of the queries; None if these are the last T slots of every row.
        sink_keys, sink_values: [B, N, J, K]; None without sinks.
        sink_slots: [B or 1, N] absolute slots, -1 for a sink that the row does not have.
        sink_segments: [B, N] document numbers of the sinks; None for one document.
        first_slot: absolute slot of keys[:, 0].
    """

    keys: Tensor
    values: Tensor
    recurrent_inputs: RecurrentInputs
    ordinals: Tensor
    key_mask: Tensor | None
    segments: Tensor | None
    is_new: Tensor | None
    sink_keys: Tensor | None
    sink_values: Tensor | None
    sink_slots: Tensor | None
    sink_segments: Tensor | None
    first_slot: int

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.keys.shape[1]

    @property
    def end(self) -> int:
        """Absolute slot after the last."""
        return self.first_slot + self.length

    @property
    def is_plain(self) -> bool:
        """True without padding and without a second document: slots are ordinals."""
        return self.key_mask is None and self.segments is None

    def slots(self, start: int, end: int) -> Slots:
        """Return slots [start, end), counted from the context's own first slot.

        Recurrent inputs may cover the newest slots alone. Then only those of the slots that have them are returned.
        """

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, start:end]

        def cut_inputs(x: Tensor) -> Tensor:
            # the first slots may have no inputs: only a delayed branch keeps those of earlier tokens
            missing = self.length - x.shape[1]
            return x[:, max(0, start - missing) : max(0, end - missing)]

        return Slots(
            self.keys[:, start:end],
            self.values[:, start:end],
            self.recurrent_inputs.map(cut_inputs),
            self.ordinals[:, start:end],
            cut(self.key_mask),
            cut(self.segments),
            cut(self.is_new),
        )

    def part(self, start: int, end: int) -> "Context":
        """Return the context cut to slots [start, end), counted from its own first slot."""
        return replace(self, **self.slots(start, end)._asdict(), first_slot=self.first_slot + start)

    def behind(self, count: int, delay: int) -> Slots:
        """Return `count` slots, the last of them `delay` slots before the newest."""
        end = self.length - delay
        return self.slots(end - count, end)

    def decode_assignments(self, newest: Tensor, decode: Callable[[Tensor], Tensor]) -> "Context":
        """Return a cache's context with decoded assignments; the newest tokens' are given, [B, T, J, ·]."""
        assert self.recurrent_inputs.assignment is not None, "a context without assignments has none to decode"
        cached = self.recurrent_inputs.assignment[:, : -newest.shape[1]]
        if self.is_new is not None and cached.shape[1]:  # a row with padding has fewer new tokens, behind cached ones
            last = self.is_new[:, -newest.shape[1] :, None, None]
            newest = torch.where(last, newest, decode(self.recurrent_inputs.assignment[:, -newest.shape[1] :]))
        assignment = torch.cat([decode(cached), newest], dim=1) if cached.shape[1] else newest
        return replace(self, recurrent_inputs=RecurrentInputs(assignment=assignment))

    def sees_all_sinks(self, queries: int, window: int) -> bool:
        """Return True if slot numbers alone prove that every sink has left the window of every query."""
        sinks = 0 if self.sink_keys is None else self.sink_keys.shape[1]
        return self.is_plain and self.end - queries - window >= sinks - 1

    def sink_mask(self, queries: int, window: int) -> Tensor:
        """Return [B or 1, T, N] bool: True for the sinks of the query's own document that have left its window."""
        assert self.sink_slots is not None, "a context without sinks has no sink mask"
        slots = torch.arange(self.end - queries, self.end, device=self.keys.device)
        mask = (slots[None, :, None] - self.sink_slots[:, None, :] >= window) & (self.sink_slots >= 0)[:, None]
        if self.segments is not None and self.sink_segments is not None:
            mask = mask & (self.segments[:, -queries:, None] == self.sink_segments[:, None, :])
        return mask


@dataclass
class Step:
    """The context of a single query whose window is full, once all sinks have left it and if no row is padded.

    Attributes:
        keys, values: [B, N + window, J, K], the sinks and the window with the query's own slot, in no order.
        arriving, leaving: the query's own slot, and the slot that its window has just lost.
        length: slots in reach, the leaving one included.
        end: absolute slot after the query's.
    """

    keys: Tensor
    values: Tensor
    arriving: Slots
    leaving: Slots
    length: int
    end: int
    is_plain = True

    def behind(self, count: int, delay: int) -> Slots:
        """Return the slot that left the window if there is a delay, else the query's own; see `Context.behind`."""
        return self.leaving if delay else self.arriving

    def decode_assignments(self, newest: Tensor, decode: Callable[[Tensor], Tensor]) -> "Step":
        """Return the step with decoded assignments; see `Context.decode_assignments`."""
        arriving = self.arriving._replace(recurrent_inputs=RecurrentInputs(assignment=newest))
        leaving = self.leaving._replace(recurrent_inputs=self.leaving.recurrent_inputs.map(decode))
        return replace(self, arriving=arriving, leaving=leaving)


def context_of(
    keys: Tensor,
    values: Tensor,
    recurrent_inputs: RecurrentInputs,
    *,
    sinks: int,
    padding_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Context:
    """Return the context of whole rows without a cache: the keys and values of all tokens, sinks picked out of them.

    Args:
        keys, values: [B, S, J, K], keys after rotary.
        sinks: number of first tokens of each document that are sinks.
        padding_mask: [B, S] bool, False for padding, which comes first.
        segments: [B, S] document numbers.
    """
    ordinals = ordinals_of(padding_mask, segments, keys.shape[1], keys.device)
    sink_keys = sink_values = sink_slots = sink_segments = None
    if sinks:
        plain = padding_mask is None and segments is None
        sink_slots = ordinals[:, :sinks] if plain else _sink_slots(ordinals, sinks)
        index = sink_slots.clamp(min=0).expand(keys.shape[0], -1)
        sink_keys, sink_values = gather_slots(keys, index), gather_slots(values, index)
        sink_segments = None if segments is None else segments.gather(1, index)
    return Context(
        keys,
        values,
        recurrent_inputs,
        ordinals,
        padding_mask,
        segments,
        None,
        sink_keys,
        sink_values,
        sink_slots,
        sink_segments,
        first_slot=0,
    )


def ordinals_of(padding_mask: Tensor | None, segments: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return the ordinals [B or 1, length] of the first `length` tokens of a row."""
    if segments is not None:
        slots = torch.arange(length, device=device).expand(segments.shape)
        change = torch.ones_like(segments, dtype=torch.bool)
        change[:, 1:] = segments[:, 1:] != segments[:, :-1]
        return slots - torch.where(change, slots, 0).cummax(dim=-1).values
    if padding_mask is None:
        return torch.arange(length, device=device)[None]
    return torch.where(padding_mask, padding_mask.cumsum(-1) - 1, -1)


def gather_slots(x: Tensor, index: Tensor) -> Tensor:
    """Return x[b, index[b]]: [B, S, J, K], [B, N] -> [B, N, J, K]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _sink_slots(ordinals: Tensor, sinks: int) -> Tensor:
    """Return the slots of the tokens with ordinal < sinks, ascending, padded with -1: [B or 1, N]."""
    is_sink = (ordinals >= 0) & (ordinals < sinks)
    count = int(is_sink.sum(-1).max())
    slots = torch.arange(ordinals.shape[1], device=ordinals.device).expand_as(ordinals)
    order = torch.where(is_sink, slots, ordinals.shape[1]).sort(-1).values[:, :count]
    return torch.where(order < ordinals.shape[1], order, -1)
