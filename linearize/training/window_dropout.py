"""Window dropout: for one training step some linear heads see less of their window, so that the recurrent branch does more."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from linearize.modeling.branch import LinearHeads

SHORTENED = 4


@contextlib.contextmanager
def window_dropout(model: nn.Module, probability: float) -> Iterator[None]:
    """Inside, each layer's window is a quarter as long with this probability; in the mix `sum` it is switched off.

    Tokens beyond the shortened window belong to the recurrent branch in the mixes that share them out, so no token is lost.
    Forward and backward both belong inside.
    """
    changed: list[LinearHeads] = []
    if probability:
        heads = [module for module in model.modules() if isinstance(module, LinearHeads)]
        drawn = torch.rand(len(heads))
        changed = [module for module, draw in zip(heads, drawn) if draw < probability]
    lengths = [module.window for module in changed]
    for module in changed:
        if module.delayed:
            module.window = max(1, module.window // SHORTENED)
        else:
            module.window_enabled = False
    try:
        yield
    finally:
        for module, length in zip(changed, lengths):
            module.window, module.window_enabled = length, True
