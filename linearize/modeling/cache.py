"""What a linearized layer remembers, and what its queries can see.

A slot is a position in the padded row, counted from the first token the cache ever saw; an ordinal is a token's
number within its document, -1 for padding. Left-padded rows share slots but not ordinals.

Shapes: B batch, S slots, J linear key/value heads, K head dim, N sink keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from linearize.mixers.mixer import RecurrentInputs

# what models call their cache, as argument and in their output
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
# softmax heads' slots for tokens to come: at least so many, and one in so many of those that are there
SPARE, SPARE_SHARE = 64, 32


class Slots(NamedTuple):
    """What a recurrent branch reads of some slots: [B, n, J, ·], ordinals, mask and segments [B, n] as in `Context`."""

    keys: Tensor
    values: Tensor
    recurrent_inputs: RecurrentInputs
    ordinals: Tensor | None = None
    key_mask: Tensor | None = None
    segments: Tensor | None = None


@dataclass
class Context:
    """The keys and values in reach of the current queries, which are its last T slots.

    Attributes:
        keys, values: [B, S, J, K], keys after rotary.
        recurrent_inputs: the other inputs of the recurrent branch, of all S slots or of the newest alone.
        ordinals: [B or 1, S] int64.
        key_mask: [B, S] bool, None without padding. segments: [B, S] document numbers, None for one document.
        sink_keys, sink_values: [B, N, J, K] or None. sink_slots: [B or 1, N] absolute slots, -1 where there is none.
        sink_segments: [B, N] or None.
        first_slot: absolute slot of keys[:, 0].
    """

    keys: Tensor
    values: Tensor
    recurrent_inputs: RecurrentInputs
    ordinals: Tensor
    key_mask: Tensor | None
    segments: Tensor | None
    sink_keys: Tensor | None
    sink_values: Tensor | None
    sink_slots: Tensor | None
    sink_segments: Tensor | None
    first_slot: int

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def end(self) -> int:
        """The absolute slot behind the last."""
        return self.first_slot + self.length

    @property
    def is_plain(self) -> bool:
        """Whether there is neither padding nor a second document, so that slots are ordinals."""
        return self.key_mask is None and self.segments is None

    def slots(self, start: int, end: int) -> Slots:
        """Slots [start, end)."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, start:end]

        def cut_inputs(x: Tensor) -> Tensor:
            missing = self.length - x.shape[1]  # a branch that does not wait has the newest slots alone
            return x[:, max(0, start - missing) : max(0, end - missing)]

        return Slots(
            cut(self.keys),
            cut(self.values),
            self.recurrent_inputs.map(cut_inputs),
            cut(self.ordinals),
            cut(self.key_mask),
            cut(self.segments),
        )

    def part(self, start: int, end: int) -> "Context":
        """The context cut to slots [start, end)."""
        return replace(self, **self.slots(start, end)._asdict(), first_slot=self.first_slot + start)

    def behind(self, count: int, delay: int) -> Slots:
        """The `count` slots that end `delay` before the last."""
        end = self.length - delay
        return self.slots(end - count, end)

    def sees_all_sinks(self, queries: int, window: int) -> bool:
        """Whether all sinks have left the window of every query, where that can be said without a look at tensors."""
        return self.is_plain and self.end - queries - window >= self.sink_keys.shape[1] - 1

    def sink_mask(self, queries: int, window: int) -> Tensor:
        """[B or 1, T, N] bool: the sinks of the query's own document that have left its window."""
        slots = torch.arange(self.end - queries, self.end, device=self.keys.device)
        mask = (slots[None, :, None] - self.sink_slots[:, None, :] >= window) & (self.sink_slots >= 0)[:, None]
        if self.segments is not None:
            mask = mask & (self.segments[:, -queries:, None] == self.sink_segments[:, None, :])
        return mask


@dataclass
class Step:
    """What one query sees when all sinks have left its full window and no row is padded.

    Attributes:
        keys, values: [B, N + window, J, K], the sinks and the window, the query's own among them, in no order.
        arriving, leaving: the query's own slot, and the one that its window has just lost.
        length: slots in reach, that one included. end: the absolute slot behind the query's.
    """

    keys: Tensor
    values: Tensor
    arriving: Slots
    leaving: Slots
    length: int
    end: int
    is_plain = True

    def behind(self, count: int, delay: int) -> Slots:
        """As in `Context`."""
        return self.leaving if delay else self.arriving


def ordinals_of(padding_mask: Tensor | None, segments: Tensor | None, length: int, device) -> Tensor:
    """Ordinals of `length` tokens that start a cache or a row: [B or 1, length]."""
    if segments is not None:
        slots = torch.arange(length, device=device).expand(segments.shape)
        change = torch.ones_like(segments, dtype=torch.bool)
        change[:, 1:] = segments[:, 1:] != segments[:, :-1]
        return slots - torch.where(change, slots, 0).cummax(dim=-1).values
    if padding_mask is None:
        return torch.arange(length, device=device)[None]
    return torch.where(padding_mask, padding_mask.cumsum(-1) - 1, -1)


def context_of(
    keys: Tensor,
    values: Tensor,
    recurrent_inputs: RecurrentInputs,
    *,
    sinks: int,
    padding_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Context:
    """The context of whole rows without a cache: every token's keys and values, sinks picked out of them."""
    ordinals = ordinals_of(padding_mask, segments, keys.shape[1], keys.device)
    sink_keys = sink_values = sink_slots = sink_segments = None
    if sinks:
        plain = padding_mask is None and segments is None
        sink_slots = ordinals[:, :sinks] if plain else _sink_slots(ordinals, sinks)
        index = sink_slots.clamp(min=0).expand(keys.shape[0], -1)
        sink_keys, sink_values = _take(keys, index), _take(values, index)
        sink_segments = None if segments is None else segments.gather(1, index)
    return Context(
        keys,
        values,
        recurrent_inputs,
        ordinals,
        padding_mask,
        segments,
        sink_keys,
        sink_values,
        sink_slots,
        sink_segments,
        first_slot=0,
    )


def _sink_slots(ordinals: Tensor, sinks: int) -> Tensor:
    """Slots of the tokens with ordinal < sinks, ascending, padded with -1: [B or 1, N]."""
    is_sink = (ordinals >= 0) & (ordinals < sinks)
    count = int(is_sink.sum(-1).max())
    slots = torch.arange(ordinals.shape[1], device=ordinals.device).expand_as(ordinals)
    order = torch.where(is_sink, slots, ordinals.shape[1]).sort(-1).values[:, :count]
    return torch.where(order < ordinals.shape[1], order, -1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b]]: [B, S, J, K], [B, N] -> [B, N, J, K]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _can_write(held: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    """Whether what a cache holds can take new tokens in place: no gradient passes, and both are of one kind."""
    if torch.is_grad_enabled() or any(x.requires_grad for x in held):
        return False
    if any(x.dtype != y.dtype or x.shape[0] != y.shape[0] for x, y in zip(held, new)):
        return False
    return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in held)


class WindowCache:
    """What some heads of one layer keep: the sinks, the last `window` slots and the float32 recurrent state. Its memory
    does not grow with the sequence.

    Sinks and window lie behind one another, so that a query reads them in one piece. Once the window is full, single
    tokens overwrite what leaves it, and nothing is moved: `steps` says how many have since the window was last in order.
    """

    TENSORS = ("keys", "values", "ordinals", "sink_slots", "seen", "recurrent_state")

    def __init__(self, window: int, sinks: int, store_recurrent_inputs: bool):
        self.window, self.sinks, self.store_recurrent_inputs = window, sinks, store_recurrent_inputs
        self.clear()

    def clear(self) -> None:
        for name in self.TENSORS:
            setattr(self, name, None)
        self.recurrent_inputs = RecurrentInputs()
        self.length = self.steps = 0
        self.padded = self.sinks_filled = False

    def tensors(self) -> list[Tensor]:
        """Return every tensor that the cache stores."""
        stored = [*(getattr(self, name) for name in self.TENSORS), *self.recurrent_inputs]
        return [x for x in stored if x is not None]

    def extend(
        self, keys: Tensor, values: Tensor, recurrent_inputs: RecurrentInputs, padding_mask: Tensor | None
    ) -> Context | Step:
        """Takes new tokens, [B, T, J, K], and returns what their queries can see.

        Keeps the last `window` slots: a token leaves the window cache when it enters the recurrent state.
        """
        if padding_mask is None and keys.shape[1] == 1 and self._can_step(keys, values, recurrent_inputs):
            return self._step(keys, values, recurrent_inputs)
        B, T = keys.shape[:2]
        if self.seen is None:
            self.seen = torch.zeros(B, dtype=torch.long, device=keys.device)
            self.keys, self.values = (
                keys.new_zeros(B, self.sinks, *keys.shape[2:]),
                values.new_zeros(B, self.sinks, *values.shape[2:]),
            )
        self._put_in_order()
        if padding_mask is None:
            ordinals = self.seen[:, None] + torch.arange(T, device=keys.device)
        else:
            ordinals = torch.where(padding_mask, self.seen[:, None] + padding_mask.cumsum(-1) - 1, -1)
            self.padded = True
        sink_keys, sink_values = self._take_sinks(keys, values, ordinals)
        self.seen = self.seen + (T if padding_mask is None else padding_mask.sum(-1))

        def joined(past: Tensor | None, new: Tensor) -> Tensor:
            return new if past is None else torch.cat([past, new], dim=1)

        keys, values = joined(self.keys[:, self.sinks :], keys), joined(self.values[:, self.sinks :], values)
        recurrent_inputs = self.recurrent_inputs.joined(recurrent_inputs)
        ordinals = joined(self.ordinals, ordinals)
        self.length += T
        context = Context(
            keys,
            values,
            recurrent_inputs,
            ordinals,
            key_mask=ordinals >= 0 if self.padded else None,
            segments=None,
            sink_keys=sink_keys if self.sinks else None,
            sink_values=sink_values if self.sinks else None,
            sink_slots=self.sink_slots,
            sink_segments=None,
            first_slot=self.length - keys.shape[1],
        )
        # copies, so that a prefill's full-length tensors are freed
        self.keys = torch.cat([sink_keys, keys[:, -self.window :]], dim=1)
        self.values = torch.cat([sink_values, values[:, -self.window :]], dim=1)
        if self.store_recurrent_inputs:
            self.recurrent_inputs = recurrent_inputs.map(lambda x: x[:, -self.window :].clone())
        self.ordinals = ordinals[:, -self.window :].clone()
        return context

    def _can_step(self, keys: Tensor, values: Tensor, recurrent_inputs: RecurrentInputs) -> bool:
        """Whether the window is full and has lost all sinks, and its tensors can take what a new token has."""
        if self.padded or self.length < self.window + self.sinks:
            return False
        stored = [(x, y) for x, y in zip(self.recurrent_inputs, recurrent_inputs) if x is not None]
        return _can_write(*zip((self.keys, keys), (self.values, values), *stored))

    def _step(self, keys: Tensor, values: Tensor, recurrent_inputs: RecurrentInputs) -> Step:
        place = self.steps % self.window

        def overwrite(stored: Tensor, new: Tensor) -> Tensor:
            """Put a new slot in the oldest one's place, and return the oldest."""
            slot = stored[:, -self.window :][:, place : place + 1]  # sinks come before the window
            oldest = slot.clone()
            slot.copy_(new)
            return oldest

        inputs = zip(self.recurrent_inputs, recurrent_inputs)
        leaving = Slots(
            overwrite(self.keys, keys),
            overwrite(self.values, values),
            RecurrentInputs(*(None if stored is None else overwrite(stored, new) for stored, new in inputs)),
        )
        self.steps += 1
        self.length += 1
        arriving = Slots(keys, values, recurrent_inputs)
        return Step(self.keys, self.values, arriving, leaving, self.window + 1, self.length)

    def _put_in_order(self) -> None:
        """The window by age again, after single steps."""
        if not self.steps:
            return
        oldest = self.steps % self.window
        for name in ("keys", "values"):
            sinks, window = getattr(self, name).split([self.sinks, self.window], dim=1)
            setattr(self, name, torch.cat([sinks, window.roll(-oldest, dims=1)], dim=1))
        self.recurrent_inputs = self.recurrent_inputs.map(lambda x: x.roll(-oldest, dims=1))
        self.ordinals, self.seen = self.ordinals + self.steps, self.seen + self.steps
        self.steps = 0

    def _take_sinks(self, keys: Tensor, values: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """The sinks' keys and values, [B, N, J, K], with those among the new tokens."""
        sink_keys, sink_values = self.keys[:, : self.sinks], self.values[:, : self.sinks]
        if not self.sinks or self.sinks_filled:
            return sink_keys, sink_values
        if self.sink_slots is None:
            self.sink_slots = torch.full((keys.shape[0], self.sinks), -1, dtype=torch.long, device=keys.device)
        match = ordinals[:, None, :] == torch.arange(self.sinks, device=keys.device)[None, :, None]
        found, index = match.any(-1), match.int().argmax(-1)
        self.sink_slots = torch.where(found, index + self.length, self.sink_slots)
        self.sinks_filled = bool((self.sink_slots >= 0).all())
        found = found[..., None, None]
        return torch.where(found, _take(keys, index), sink_keys), torch.where(found, _take(values, index), sink_values)


class LinearizedLayer(CacheLayerMixin):
    """Cache of one layer: `linear`, what its linear heads keep; of its softmax heads all keys and values, or `kept`
    where they have a window too, and then no memory grows with the sequence.

    `keys` and `values` are the softmax heads', in the layout of transformers, [B, heads, S, K]; None without any. In a
    layer that has a sliding window of its own they are what DynamicSlidingWindowLayer keeps, so that masks fit both;
    elsewhere they lie in `rooms`, [B, heads, capacity, K], so that a token more does not copy all that came before it.
    """

    is_croppable = False
    is_compileable = False
    supports_early_init = False

    TENSORS = ("keys", "values")

    def __init__(
        self,
        linear_cache: WindowCache | None,
        softmax_window_cache: WindowCache | None,
        sliding_window: int | None = None,
    ):
        super().__init__()
        self.linear_cache, self.softmax_window_cache = linear_cache, softmax_window_cache
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self._clear()

    def _clear(self) -> None:
        for holder in self._holders():
            if holder is not self:
                holder.clear()
        self.keys = self.values = self.rooms = None
        self.length = 0
        self.is_initialized = False

    def _holders(self) -> list["LinearizedLayer | WindowCache"]:
        """What has tensors."""
        return [holder for holder in (self, self.linear_cache, self.softmax_window_cache) if holder is not None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise ValueError("this cache was filled in linear mode and cannot serve softmax attention; use a new cache")

    def advance(self, key_states: Tensor, value_states: Tensor) -> None:
        """Counts the layer's new tokens, [B, heads, T, K]; its heads' caches take them one by one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]

    def extend_softmax(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values of the softmax heads, [B, heads, T, K], and returns all that are in reach."""
        new, held = (key_states, value_states), (self.keys, self.values)
        if self.keys is None:
            keys, values = new
        elif self.sliding_window is None and _can_write(self.rooms or held, new):
            keys, values = self._append(held, new)
        else:
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(held, new))
            self.rooms = None
        start = 0 if self.sliding_window is None else max(0, keys.shape[-2] - self.sliding_window + 1)
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        return keys, values

    def _append(self, held: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> list[Tensor]:
        """What is held with the new behind it; where there is no room for it, all moves to larger rooms."""
        old = held[0].shape[-2]
        end = old + new[0].shape[-2]
        if self.rooms is None or self.rooms[0].shape[-2] < end:
            capacity = end + max(SPARE, end // SPARE_SHARE)
            self.rooms = [x.new_empty(*x.shape[:2], capacity, x.shape[-1]) for x in held]
            for room, x in zip(self.rooms, held):
                room[:, :, :old] = x
        for room, x in zip(self.rooms, new):
            room[:, :, old:end] = x
        return [room[:, :, :end] for room in self.rooms]

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        tensors = self.rooms or [self.keys, self.values]
        tensors = [
            *tensors,
            *(x for cache in (self.linear_cache, self.softmax_window_cache) if cache for x in cache.tensors()),
        ]
        return sum(x.nbytes for x in tensors if x is not None)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = 0 if self.sliding_window is None else max(0, self.length - self.sliding_window + 1)
        return self.length - offset + query_length, offset

    def _apply(self, function) -> None:
        for holder in self._holders():
            for name in holder.TENSORS:
                tensor = getattr(holder, name)
                if tensor is not None:
                    setattr(holder, name, function(tensor))
            if isinstance(holder, WindowCache):
                holder.recurrent_inputs = holder.recurrent_inputs.map(function)
        self.rooms = None

    def offload(self) -> None:
        self._apply(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a linearized cache cannot be cropped: its recurrent state does not run backwards")


def adopt_layer(cache: Cache, layer_idx: int, new_caches: Callable[[], list[WindowCache | None]]) -> LinearizedLayer:
    """The linearized layer at `layer_idx`, put in place of the empty layer transformers made there with what
    `new_caches` makes for its linear and its softmax heads."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"linearized models need a DynamicCache (the default of generate); got {type(cache).__name__}. Static, "
            "quantised and paged caches and continuous batching cannot hold a recurrent state"
        )
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, LinearizedLayer):
        if layer.get_seq_length() > 0:
            raise ValueError(
                f"layer {layer_idx} of this cache was filled by another model or in softmax mode; a linearized model "
                "needs a cache of its own"
            )
        sliding_window = layer.sliding_window if layer.is_sliding else None
        layer = cache.layers[layer_idx] = LinearizedLayer(*new_caches(), sliding_window)
    return layer
