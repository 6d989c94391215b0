"""Load the weights of the layer that comes next while the present one computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn


class NextLayer:
    """One layer's weights on their way, in a thread of its own; on a CUDA device in a stream of its own.

    Args:
        layers: the decoder layers.
        load: reads the weights of layer `index` into memory.
        device: computes the layers.
    """

    def __init__(self, layers: nn.ModuleList, load: Callable[[int], None], device: torch.device):
        self.layers, self._load, self.device = layers, load, device
        self.on_cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self.on_cuda else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-layer")
        self._coming: tuple[int, Future[None]] | None = None

    def begin(self, index: int) -> None:
        """Begin to load a layer."""
        self._coming = (index, self._thread.submit(self._fetch, index))

    def wait_for(self, index: int) -> None:
        """Return when a layer has its weights: now if they were on their way, else after loading them."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].result()
        if coming is None or coming[0] != index:
            self._fetch(index)
        if self.on_cuda:
            # the allocator must not hand this memory to the next copy before this layer has computed
            for parameter in self.layers[index].parameters():
                parameter.record_stream(torch.cuda.current_stream(self.device))

    def _fetch(self, index: int) -> None:
        """Read a layer into memory, and from there into the device's."""
        self._load(index)
        if self._copies is None:
            return
        with torch.cuda.stream(self._copies):
            waiting = []  # pinned memory, until its copy is done
            for parameter in self.layers[index].parameters():
                if parameter.device.type == "cpu":
                    waiting.append(parameter.data.pin_memory())
                    parameter.data = waiting[-1].to(self.device, non_blocking=True)
        self._copies.synchronize()
