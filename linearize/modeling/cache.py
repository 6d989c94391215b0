"""The cache of a linearized model inside transformers' DynamicCache: one layer for its softmax and its linear heads.

Shapes: B batch, T new tokens, S tokens in reach, K head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from linearize.modeling.window_cache import WindowCache, can_write

# the name of a model's cache, as argument and in its output
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
# free slots that softmax heads' buffers are given: at least SPARE, and one for every SPARE_SHARE slots in use, so that
# appending a token costs little on average while memory grows by about 3%
SPARE, SPARE_SHARE = 64, 32


class LinearizedLayer(CacheLayerMixin):
    """The cache of one layer.

    Softmax heads have all their keys and values here, or a cache of their own if they have a window. In a layer with a
    sliding window of the base's, `keys` and `values` are those that transformers' DynamicSlidingWindowLayer stores, so
    that its masks fit both. Elsewhere they are the front of larger buffers: a new token does not copy all before it.

    Attributes:
        linear_cache: the cache of the linear heads, None without any.
        softmax_window_cache: the cache of softmax heads that have a window. With it no memory grows with the sequence.
        keys, values: [B, heads, S, K] of softmax heads without a window; None without any.
        buffers: [B, heads, capacity, K], the tensors that `keys` and `values` are views of; None if they are not.
        sliding_window: the base's own sliding window, None if the layer has none.
        length: tokens since the start, padding included.
    """

    is_croppable = False
    is_compileable = False
    supports_early_init = False

    keys: Tensor | None
    values: Tensor | None
    buffers: list[Tensor] | None
    length: int

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
        for cache in self._window_caches():
            cache.clear()
        self.keys = self.values = self.buffers = None
        self.length = 0
        self.is_initialized = False

    def _window_caches(self) -> list[WindowCache]:
        return [cache for cache in (self.linear_cache, self.softmax_window_cache) if cache is not None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the dtype and device of the layer's tensors."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse the keys and values of softmax mode."""
        raise ValueError("this cache was filled in linear mode and cannot serve softmax attention; use a new cache")

    def advance(self, key_states: Tensor, value_states: Tensor) -> None:
        """Count the layer's new tokens, [B, heads, T, K]. The caches of its heads are extended one by one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]

    def extend_softmax(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of the softmax heads, [B, heads, T, K], and return all that are in reach."""
        if self.keys is None or self.values is None:
            keys, values = key_states, value_states
        elif self.sliding_window is None and can_write(
            self.buffers or (self.keys, self.values), (key_states, value_states)
        ):
            keys, values = self._append((self.keys, self.values), (key_states, value_states))
        else:
            keys = torch.cat([self.keys, key_states], dim=-2)
            values = torch.cat([self.values, value_states], dim=-2)
            self.buffers = None
        start = 0 if self.sliding_window is None else max(0, keys.shape[-2] - self.sliding_window + 1)
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        return keys, values

    def _append(self, stored: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return stored tensors with new slots behind them. If they do not fit the buffers, all move to larger ones."""
        old = stored[0].shape[-2]
        end = old + new[0].shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            capacity = end + max(SPARE, end // SPARE_SHARE)
            self.buffers = [x.new_empty(*x.shape[:2], capacity, x.shape[-1]) for x in stored]
            for buffer, x in zip(self.buffers, stored):
                buffer[:, :, :old] = x
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, old:end] = x
        return [buffer[:, :, :end] for buffer in self.buffers]

    def nbytes(self) -> int:
        """Return the bytes of every tensor of the layer."""
        tensors = self.buffers or [x for x in (self.keys, self.values) if x is not None]
        return sum(x.nbytes for x in [*tensors, *(x for cache in self._window_caches() for x in cache.tensors())])

    def get_seq_length(self) -> int:
        """Return the number of tokens since the start."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of the softmax heads' mask, and the slot of the first."""
        offset = 0 if self.sliding_window is None else max(0, self.length - self.sliding_window + 1)
        return self.length - offset + query_length, offset

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor x by function(x)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = function(self.keys), function(self.values)
        for cache in self._window_caches():
            cache.apply(function)
        self.buffers = None

    def offload(self) -> None:
        """Move all tensors to the CPU."""
        self._apply(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tensors back to their device."""
        if self.is_initialized:
            self._apply(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices`."""
        self._apply(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens."""
        if tokens_to_remove:
            raise ValueError("a linearized cache cannot be cropped: its recurrent state does not run backwards")


def adopt_layer(
    cache: Cache, layer_idx: int, new_caches: Callable[[], tuple[WindowCache | None, WindowCache | None]]
) -> LinearizedLayer:
    """Return the linearized layer at `layer_idx`, put in place of the empty layer that transformers made there.

    Args:
        new_caches: makes the caches of the linear heads and of softmax heads with a window, in this order.

    Raises:
        ValueError: the cache is of another kind, or another model filled the layer.
    """
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
