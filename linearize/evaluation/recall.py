"""Copy recall: next-token accuracy on the second copy of a span of random tokens, by the distance between copies.

A row is [start, random span, filler, the span again]; the span is as long as the distance, at most 256 tokens, and the
filler makes up the rest of the distance. Random tokens cannot be predicted, so every right answer was read from the
first copy `distance` tokens back. The first 8 tokens of the second copy are not counted: until some of it is seen
there is nothing to match.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPAN = 256
SKIPPED = 8


@dataclass(frozen=True)
class RecallTask:
    """Rows [rows, tokens] and the number of final predictions that count."""

    distance: int
    ids: Tensor
    counted: int


def recall_task(distance: int, rows: int, vocabulary: int, start_token: int | None, seed: int) -> RecallTask:
    """Rows for one distance, the same for every model and every run with this seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + distance)
    span_length = min(distance, SPAN)

    def random(length: int) -> Tensor:
        return torch.randint(vocabulary, (rows, length), generator=generator)

    span, filler = random(span_length), random(distance - span_length)
    start = torch.full((rows, 0 if start_token is None else 1), start_token or 0)
    return RecallTask(distance, torch.cat([start, span, filler, span], dim=1), max(1, span_length - SKIPPED))


def accuracy(hidden: Tensor, head: Tensor, ids: Tensor, counted: int) -> float:
    """Share of the last `counted` tokens of one row predicted exactly. hidden: [T, D]; ids: [T]."""
    predicted = (hidden[-counted - 1 : -1] @ head.T).argmax(-1)
    return (predicted == ids[-counted:]).float().mean().item()
