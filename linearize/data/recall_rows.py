"""Make rows of random tokens that test recall: spans to copy, and pairs of a key and a value to answer."""

from dataclasses import dataclass

import torch
from torch import Tensor

# tokens of a span to copy
SPAN = 256
# first tokens of a copy that do not count: from them the model has yet to recognise the span
SKIPPED = 8
# pairs of a row
PAIRS = 32


@dataclass(frozen=True)
class RecallTask:
    """Rows that end with a copy or with answers.

    Attributes:
        distance: tokens from the start of the span, or of the pairs, to its repetition.
        ids: token ids [rows, tokens].
        counted: final predictions of a row that count.
    """

    distance: int
    ids: Tensor
    counted: int


def recall_task(distance: int, rows: int, vocabulary: int, start_token: int | None, seed: int) -> RecallTask:
    """Make rows that repeat a span at one distance: start token, span, filler, span.

    The rows are the same for every model and every run with this seed.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + distance)
    span_length = min(distance, SPAN)

    def random_tokens(length: int) -> Tensor:
        return torch.randint(vocabulary, (rows, length), generator=generator)

    span, filler = random_tokens(span_length), random_tokens(distance - span_length)
    start = _start_tokens(start_token).expand(rows, -1)
    return RecallTask(distance, torch.cat([start, span, filler, span], dim=1), max(1, span_length - SKIPPED))


def associative_task(distance: int, rows: int, vocabulary: int, start_token: int | None, seed: int) -> RecallTask:
    """Make rows of one distance: 32 pairs (fewer at short distances), filler, and the pairs again in another order.

    The filler repeats a token only once it has used all that are in no pair.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + distance + 500_009)
    pairs = max(1, min(PAIRS, distance // 2, vocabulary // 4))
    filler_length = max(0, distance - 2 * pairs)
    task_rows = []
    for _ in range(rows):
        tokens = torch.randperm(vocabulary, generator=generator)
        couples, others = tokens[: 2 * pairs].view(pairs, 2), tokens[2 * pairs :]
        filler = others[torch.arange(filler_length) % others.numel()]
        reordered = couples[torch.randperm(pairs, generator=generator)]
        task_rows.append(torch.cat([_start_tokens(start_token), couples.flatten(), filler, reordered.flatten()]))
    return RecallTask(distance, torch.stack(task_rows), pairs)


def _start_tokens(start_token: int | None) -> Tensor:
    """Return the token that every row starts with, or none: [1] or [0]."""
    return torch.tensor([] if start_token is None else [start_token], dtype=torch.long)
