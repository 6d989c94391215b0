"""Window dropout: in a training step some linear heads see less of their window, so the recurrent branch does more."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from linearize.modeling.linear_heads import LinearHeads

# a shortened window is this many times shorter
SHORTENED = 4


@contextlib.contextmanager
def window_dropout(model: nn.Module, probability: float) -> Iterator[None]:
    """Shorten each layer's window to a quarter with this probability; in the mix `sum` switch it off.

    The mixes that share tokens out give those beyond the shortened window to the recurrent branch, so no token is lost.
    Forward and backward both belong inside the context.
    """
    shortened: list[LinearHeads] = []
    if probability:
        heads = [module for module in model.modules() if isinstance(module, LinearHeads)]
        chosen = torch.rand(len(heads)) < probability
        shortened = [module for module, shorten in zip(heads, chosen.tolist()) if shorten]
    windows = [module.window for module in shortened]
    for module in shortened:
        if module.delayed:
            module.window = max(1, module.window // SHORTENED)
        else:
            module.window_enabled = False
    try:
        yield
    finally:
        for module, window in zip(shortened, windows):
            module.window, module.window_enabled = window, True
