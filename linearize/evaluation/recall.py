"""Recall by distance: copying, and answering with the value that went with a key.

Copy recall: next-token accuracy on the second copy of a span of random tokens, by the distance between copies.

A row is [start, random span, filler, the span again]; the span is as long as the distance, at most 256 tokens, and the
filler makes up the rest of the distance. Random tokens cannot be predicted, so every right answer was read from the
first copy `distance` tokens back. The first 8 tokens of the second copy are not counted: until some of it is seen
there is nothing to match.

Associative recall (multi-query, arXiv 2312.04927): pairs of random tokens "key value", filler, the same pairs in another
order; the model is to name each value after its key. The distance of a pair is at least the filler's length.
"""

from torch import Tensor
from transformers import PreTrainedModel

from linearize.data.recall_rows import associative_task, recall_task
from linearize.evaluation.lab import BATCH_TOKENS, Lab, final_hidden
from linearize.modeling.readout import Readout, readout_of
from linearize.report.results import ALL, WINDOW_OFF, Findings, make_metric


def accuracy(hidden: Tensor, head: Readout, ids: Tensor, counted: int) -> float:
    """Share of the last `counted` tokens of one row predicted exactly. hidden: [T, D]; ids: [T]."""
    predicted = head(hidden[-counted - 1 : -1]).argmax(-1)
    return (predicted == ids[-counted:]).float().mean().item()


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
