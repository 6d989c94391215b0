"""The cache of heads that have a window: sinks, window and recurrent state. Its size does not grow with the sequence.

Slots, ordinals and shapes are those of modeling/context.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linearize.mixers.mixer import RecurrentInputs
from linearize.modeling.context import Context, Slots, Step, gather_slots
from linearize.modeling.packing import padding_moved_ahead


class WindowCache:
    """The sinks, the last `window` slots and the recurrent state of some heads of one layer.

    Sinks and window lie in one tensor, so that a query reads them in one piece. Once the window is full, a single token
    overwrites the oldest slot and nothing is moved; `steps` counts these tokens since the window was last in order.

    Attributes:
        keys, values: [B, sinks + slots, J, K]: the sinks, then at most `window` slots.
        recurrent_inputs: those of the window's slots, encoded, if `store_recurrent_inputs`.
        ordinals: [B, slots] int64, of the window's slots when it was last in order.
        sink_slots: [B, sinks] absolute slots of the sinks, -1 for one that has not come yet.
        token_counts: [B] int64, tokens of each row without padding, when the window was last in order.
        recurrent_state: [B, J, *state_shape], float32; None before the first token has left the window.
        length: slots since the start, padding included.
        padded: true once a row had padding.
        sinks_filled: true once every row has all its sinks.
    """

    TENSORS = ("keys", "values", "ordinals", "sink_slots", "token_counts", "recurrent_state")

    keys: Tensor | None
    values: Tensor | None
    recurrent_inputs: RecurrentInputs
    ordinals: Tensor | None
    sink_slots: Tensor | None
    token_counts: Tensor | None
    recurrent_state: Tensor | None
    length: int
    steps: int
    padded: bool
    sinks_filled: bool

    def __init__(self, window: int, sinks: int, store_recurrent_inputs: bool):
        self.window, self.sinks, self.store_recurrent_inputs = window, sinks, store_recurrent_inputs
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.ordinals = None
        self.sink_slots = self.token_counts = self.recurrent_state = None
        self.recurrent_inputs = RecurrentInputs()
        self.length = self.steps = 0
        self.padded = self.sinks_filled = False

    def tensors(self) -> list[Tensor]:
        """Return every tensor that the cache stores."""
        stored = [*(getattr(self, name) for name in self.TENSORS), *self.recurrent_inputs]
        return [x for x in stored if x is not None]

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor x by function(x)."""
        for name in self.TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))
        self.recurrent_inputs = self.recurrent_inputs.map(function)

    def extend(
        self, keys: Tensor, values: Tensor, recurrent_inputs: RecurrentInputs, padding_mask: Tensor | None
    ) -> Context | Step:
        """Append T tokens and return the context of their queries.

        A token leaves the window when it enters the recurrent state: the cache stores the last `window` slots alone.

        Args:
            keys, values: [B, T, J, K], keys after rotary.
            recurrent_inputs: encoded, see `WindowHeads.encode_inputs`.
            padding_mask: [B, T] bool, False for padding, which comes first.
        """
        if padding_mask is None and keys.shape[1] == 1 and self._can_step(keys, values, recurrent_inputs):
            return self._step(keys, values, recurrent_inputs)
        self._put_in_order()
        B, T = keys.shape[:2]
        counts = keys.new_zeros(B, dtype=torch.long) if self.token_counts is None else self.token_counts
        if padding_mask is None:
            ordinals = counts[:, None] + torch.arange(T, device=keys.device)
        else:
            ordinals = torch.where(padding_mask, counts[:, None] + padding_mask.cumsum(-1) - 1, -1)
            self.padded = True
        self.token_counts = counts + (T if padding_mask is None else padding_mask.sum(-1))
        padding = None if padding_mask is None or not self.length else T - padding_mask.sum(-1)
        sink_keys, sink_values = self._extend_sinks(keys, values, ordinals, padding)

        is_new = None
        if self.keys is not None and self.values is not None and self.ordinals is not None:
            keys = torch.cat([self.keys[:, self.sinks :], keys], dim=1)
            values = torch.cat([self.values[:, self.sinks :], values], dim=1)
            ordinals = torch.cat([self.ordinals, ordinals], dim=1)
        recurrent_inputs = self.recurrent_inputs.joined(recurrent_inputs)
        if padding is not None:
            cached = keys.shape[1] - T
            keys, values, ordinals = (padding_moved_ahead(x, cached, padding) for x in (keys, values, ordinals))
            if self.store_recurrent_inputs:
                recurrent_inputs = recurrent_inputs.map(lambda x: padding_moved_ahead(x, cached, padding))
            is_new = torch.arange(cached + T, device=keys.device)[None] >= cached + padding[:, None]
        self.length += T
        context = Context(
            keys,
            values,
            recurrent_inputs,
            ordinals,
            key_mask=ordinals >= 0 if self.padded else None,
            segments=None,
            is_new=is_new,
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
        """Return True if the window is full, has lost all sinks, and can take one token in place."""
        if self.keys is None or self.values is None:
            return False
        if self.padded or self.length < self.window + self.sinks:
            return False
        inputs = [(x, y) for x, y in zip(self.recurrent_inputs, recurrent_inputs) if x is not None and y is not None]
        stored, new = zip((self.keys, keys), (self.values, values), *inputs)
        return can_write(stored, new)

    def _step(self, keys: Tensor, values: Tensor, recurrent_inputs: RecurrentInputs) -> Step:
        """Overwrite the oldest slot of a full window with the one of a new token."""
        assert self.keys is not None and self.values is not None
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
            RecurrentInputs(*(None if x is None or y is None else overwrite(x, y) for x, y in inputs)),
        )
        self.steps += 1
        self.length += 1
        arriving = Slots(keys, values, recurrent_inputs)
        return Step(self.keys, self.values, arriving, leaving, self.window + 1, self.length)

    def _put_in_order(self) -> None:
        """Sort the window by age after single steps, and count their tokens."""
        if not self.steps:
            return
        assert self.keys is not None and self.values is not None
        assert self.ordinals is not None and self.token_counts is not None
        oldest = self.steps % self.window

        def by_age(stored: Tensor) -> Tensor:
            sinks, window = stored.split([self.sinks, self.window], dim=1)
            return torch.cat([sinks, window.roll(-oldest, dims=1)], dim=1)

        self.keys, self.values = by_age(self.keys), by_age(self.values)
        self.recurrent_inputs = self.recurrent_inputs.map(lambda x: x.roll(-oldest, dims=1))
        self.ordinals, self.token_counts = self.ordinals + self.steps, self.token_counts + self.steps
        self.steps = 0

    def _extend_sinks(
        self, keys: Tensor, values: Tensor, ordinals: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the sinks, [B, sinks, J, K], including those among T new tokens.

        Args:
            keys, values: [B, T, J, K]. ordinals: [B, T], both of the new tokens.
            padding: [B], padding that is moved ahead of what is cached; None for none.
        """
        if padding is not None and self.sink_slots is not None:
            self.sink_slots = torch.where(self.sink_slots < 0, -1, self.sink_slots + padding[:, None])
        if self.keys is None or self.values is None:
            sink_keys = keys.new_zeros(keys.shape[0], self.sinks, *keys.shape[2:])
            sink_values = values.new_zeros(values.shape[0], self.sinks, *values.shape[2:])
        else:
            sink_keys, sink_values = self.keys[:, : self.sinks], self.values[:, : self.sinks]
        if not self.sinks or self.sinks_filled:
            return sink_keys, sink_values
        if self.sink_slots is None:
            self.sink_slots = torch.full((keys.shape[0], self.sinks), -1, dtype=torch.long, device=keys.device)
        match = ordinals[:, None, :] == torch.arange(self.sinks, device=keys.device)[None, :, None]
        is_new, index = match.any(-1), match.int().argmax(-1)
        self.sink_slots = torch.where(is_new, index + self.length, self.sink_slots)
        self.sinks_filled = bool((self.sink_slots >= 0).all())
        is_new = is_new[..., None, None]
        return (
            torch.where(is_new, gather_slots(keys, index), sink_keys),
            torch.where(is_new, gather_slots(values, index), sink_values),
        )


def can_write(stored: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    """Return True if new tokens can be written into stored tensors in place: no gradients, same kind of tensor."""
    if torch.is_grad_enabled() or any(x.requires_grad for x in stored):
        return False
    if any(x.dtype != y.dtype or x.shape[0] != y.shape[0] for x, y in zip(stored, new)):
        return False
    return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in stored)
