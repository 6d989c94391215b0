"""Recall by distance: copying, and answering with the value that went with a key.

Copy recall: next-token accuracy on the second copy of a span of random tokens, by the distance between copies.

A row is [start, random span, filler, the span again]; the span is as long as the distance, at most 256 tokens, and the
filler makes up the rest of the distance. Random tokens cannot be predicted, so every right answer was read from the
first copy `distance` tokens back. The first 8 tokens of the second copy are not counted: until some of it is seen
there is nothing to match.

Associative recall (multi-query, arXiv 2312.04927): pairs of random tokens "key value", filler, the same pairs in another
order; the model is to name each value after its key. The distance of a pair is at least the filler's length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.evaluation.lab import BATCH_TOKENS, Lab, final_hidden
from linearize.modeling.readout import Readout, readout_of
from linearize.report.results import ALL, WINDOW_OFF, Findings, make_metric

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


def accuracy(hidden: Tensor, head: Readout, ids: Tensor, counted: int) -> float:
    """Share of the last `counted` tokens of one row predicted exactly. hidden: [T, D]; ids: [T]."""
    predicted = head(hidden[-counted - 1 : -1]).argmax(-1)
    return (predicted == ids[-counted:]).float().mean().item()


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


def associative_accuracy(hidden: Tensor, head: Readout, ids: Tensor, pairs: int) -> float:
    """Share of the last `pairs` values of one row predicted exactly after their keys."""
    keys = slice(ids.numel() - 2 * pairs, None, 2)
    predicted = head(hidden[keys]).argmax(-1)
    return (predicted == ids[ids.numel() - 2 * pairs + 1 :: 2]).float().mean().item()


KINDS = {"recall": (recall_task, accuracy), "associative": (associative_task, associative_accuracy)}


def measure_recall(lab: Lab, kind: str, distance: int, rows: int, *, window_off: bool) -> Findings:
    """`kind` "recall" or "associative" at one distance, of every model."""
    make, score = KINDS[kind]
    task = make(distance, rows, lab.vocabulary, lab.tokenizer.bos_token_id, lab.seed)

    def scored(name: str, model: PreTrainedModel) -> list[float]:
        units = []
        head = readout_of(model)
        for batch in task.ids.split(max(1, BATCH_TOKENS // task.ids.shape[1])):
            ids = batch.to(lab.device)
            hidden = final_hidden(name, model, ids)
            units += [score(states, head, row, task.counted) for states, row in zip(hidden, ids)]
        lab.progress(f"{kind}@{distance}: {name}")
        return units

    units = lab.measure([*ALL, *[WINDOW_OFF] * window_off], scored)
    return Findings(metrics=(make_metric(f"{kind}@{distance}", "higher", units),))
