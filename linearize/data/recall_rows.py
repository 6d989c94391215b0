"""Make rows of random tokens that test recall: spans to copy, and key-value pairs to answer."""

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


PAIRS = 32


def associative_task(distance: int, rows: int, vocabulary: int, start_token: int | None, seed: int) -> RecallTask:
    """Rows of one distance: 32 pairs (fewer at short distances), filler, the pairs again, shuffled.

    The filler says no token twice until it has said all that are in no pair.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + distance + 500_009)
    pairs = max(1, min(PAIRS, distance // 2, vocabulary // 4))
    made = []
    for _ in range(rows):
        couples, others = torch.randperm(vocabulary, generator=generator).split([2 * pairs, vocabulary - 2 * pairs])
        couples, filler = couples.view(pairs, 2), others[torch.arange(max(0, distance - 2 * pairs)) % others.numel()]
        again = couples[torch.randperm(pairs, generator=generator)]
        start = [] if start_token is None else [start_token]
        made.append(torch.cat([torch.tensor(start, dtype=torch.long), couples.flatten(), filler, again.flatten()]))
    return RecallTask(distance, torch.stack(made), pairs)
