"""Measure associative recall by distance: naming the value that went with a key (multi-query, arXiv 2312.04927).

A row has pairs of random tokens "key value", filler, and the same pairs in another order. The model is to name each
value after its key. The distance of a pair is at least the filler's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import COMPARISONS, Measurement, Option, Stage
from linearize.evaluation.recall import score_rows
from linearize.report.results import SCORED_MODELS, StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite
    from linearize.modeling.readout import Readout


class AssociativeRecall(Measurement):
    """Share of values that are predicted exactly after their keys. `recall_rows` is copy recall's option."""

    name = "associative"
    options = (
        Option(
            "associative", int, (), least=1,
            suites={"standard": (64, 256, 1024, 4096), "full": (64, 256, 1024, 4096, 16384)},
        ),
    )  # fmt: skip

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        fields = suite.models(SCORED_MODELS) | COMPARISONS
        return {f"associative@{distance}": fields for distance in suite.associative}

    def positions(self, item: int) -> int:
        # start token, pairs and filler, at most 32 pairs again (data/recall_rows.py)
        return 1 + max(item, 2) + 2 * max(1, min(item // 2, 32))

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        for distance in suite.associative:
            run = partial(measure_associative, distance=distance, rows=suite.recall_rows)
            yield Stage(f"associative@{distance}", run)


def measure_associative(context: EvaluationContext, distance: int, rows: int) -> StageResult:
    """Measure associative recall of every model at one distance."""
    from linearize.data.recall_rows import associative_task

    task = associative_task(distance, rows, context.vocabulary, context.tokenizer.bos_token_id, context.seed)
    return score_rows(context, f"associative@{distance}", [*SCORED_MODELS], task, associative_accuracy)


def associative_accuracy(hidden: Tensor, readout: Readout, ids: Tensor, pairs: int) -> float:
    """Return the share of the last `pairs` values of one row that are predicted exactly after their keys.

    Args:
        hidden: [T, D]. ids: [T].
    """
    first_key = ids.numel() - 2 * pairs
    predictions = readout(hidden[first_key::2]).argmax(-1)
    return (predictions == ids[first_key + 1 :: 2]).float().mean().item()


MEASUREMENT = AssociativeRecall()
