"""Measure copy recall by distance: next-token accuracy on the second copy of a span of random tokens.

A row is [start, random span, filler, the span again]. The span is as long as the distance, at most 256 tokens, and the
filler makes up the rest of the distance. Random tokens cannot be predicted, so every right answer was read from the
first copy, `distance` tokens back. The first 8 tokens of the second copy are not counted: until some of it has been
read there is nothing to match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import COMPARISONS, Measurement, Option, Stage
from linearize.report.results import SCORED_MODELS, WINDOW_OFF, StageResult, make_metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.data.recall_rows import RecallTask
    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite
    from linearize.modeling.readout import Readout


class CopyRecall(Measurement):
    """Share of copied tokens that are predicted exactly, by the distance to the original."""

    name = "recall"
    options = (
        Option(
            "recall", int, (64, 256, 1024), least=1,
            suites={
                "quick": (64, 1024), "standard": (64, 256, 1024, 4096),
                "full": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
            },
        ),
        # rows of each distance, of copy recall and of associative recall
        Option("recall_rows", int, 8, least=1, suites={"quick": 2, "full": 16}),
    )  # fmt: skip

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        fields = suite.models(SCORED_MODELS) | COMPARISONS
        return {
            f"recall@{distance}": fields | ({WINDOW_OFF} if _measures_window_off(suite, distance) else set())
            for distance in suite.recall
        }

    def positions(self, item: int) -> int:
        # start token, span and filler, span again (data/recall_rows.py)
        return 1 + item + min(item, 256)

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        for distance in suite.recall:
            settings = {"rows": suite.recall_rows, "window_off": _measures_window_off(suite, distance)}
            yield Stage(f"recall@{distance}", partial(measure_recall, distance=distance, **settings))


def _measures_window_off(suite: Suite, distance: int) -> bool:
    """Return True if the student with its window off is measured too: at the longest distance, with `branch`."""
    return suite.branch and distance == max(suite.recall)


def measure_recall(context: EvaluationContext, distance: int, rows: int, *, window_off: bool) -> StageResult:
    """Measure copy recall of every model at one distance."""
    from linearize.data.recall_rows import recall_task

    task = recall_task(distance, rows, context.vocabulary, context.tokenizer.bos_token_id, context.seed)
    models = [*SCORED_MODELS, *[WINDOW_OFF] * window_off]
    return score_rows(context, f"recall@{distance}", models, task, accuracy)


def score_rows(
    context: EvaluationContext,
    metric: str,
    models: list[str],
    task: RecallTask,
    score: Callable[[Tensor, Readout, Tensor, int], float],
) -> StageResult:
    """Run the rows of a recall task through the named models and make a metric of the scores, one unit a row.

    Args:
        score: function of a row's hidden states [T, D], the readout, the row's ids [T] and `task.counted`.
    """
    from linearize.evaluation.context import BATCH_TOKENS, final_hidden
    from linearize.modeling.readout import readout_of

    def scores_of(name: str, model: PreTrainedModel) -> list[float]:
        scores: list[float] = []
        readout = readout_of(model)
        for batch in task.ids.split(max(1, BATCH_TOKENS // task.ids.shape[1])):
            ids = batch.to(context.device)
            hidden = final_hidden(name, model, ids)
            scores += [score(states, readout, row, task.counted) for states, row in zip(hidden, ids)]
        context.progress(f"{metric}: {name}")
        return scores

    return StageResult(metrics=(make_metric(metric, "higher", context.for_each_model(models, scores_of)),))


def accuracy(hidden: Tensor, readout: Readout, ids: Tensor, counted: int) -> float:
    """Return the share of the last `counted` tokens of one row that are predicted exactly.

    Args:
        hidden: [T, D]. ids: [T].
    """
    predictions = readout(hidden[-counted - 1 : -1]).argmax(-1)
    return (predictions == ids[-counted:]).float().mean().item()


MEASUREMENT = CopyRecall()
