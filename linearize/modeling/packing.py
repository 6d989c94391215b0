"""Move padding to the left of each row, where it takes no slot of a window, no sink and no place in a state.

Tokens keep their order and their positions, which were applied before. Shapes: B batch, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """An order of the tokens of each row in which padding comes first.

    Attributes:
        order: [B, T] int64, the token that takes each place.
        padding_mask: [B, T] bool in that order, False for padding.
    """

    order: Tensor
    padding_mask: Tensor

    @classmethod
    def of(cls, padding_mask: Tensor | None) -> "Packing | None":
        """Return the packing of rows with a padding mask [B, T]; None if padding already comes first."""
        if padding_mask is None or not bool((padding_mask[:, :-1] & ~padding_mask[:, 1:]).any()):
            return None
        order = padding_mask.to(torch.uint8).argsort(dim=1, stable=True)
        return cls(order, padding_mask.gather(1, order))

    def pack(self, x: Tensor) -> Tensor:
        """Reorder tokens, [B, T, ...]."""
        return _gather(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """Bring back the order that `pack` was given."""
        return _gather(x, self.order.argsort(dim=1))


def padding_moved_ahead(x: Tensor, cached: int, padding: Tensor) -> Tensor:
    """Move the padding that new tokens begin with in front of the cached ones.

    Args:
        x: [B, S, ...], `cached` slots and new ones.
        padding: [B] int64, number of new slots that are padding.

    Returns:
        [B, S, ...]: padding, the cached slots, the other new ones.
    """
    slots = torch.arange(x.shape[1], device=x.device)[None]
    ahead, kept = slots < padding[:, None], slots >= cached + padding[:, None]
    index = torch.where(ahead, slots + cached, torch.where(kept, slots, slots - padding[:, None]))
    return _gather(x, index)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return x[b, index[b]] of x [B, T, ...] and an index [B, T]; one row of x stands for all."""
    x = x.expand(index.shape[0], *x.shape[1:])
    return x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
