"""Measure what the recurrent branch contributes: its share of the norm of every head's output."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import Measurement, Option, Stage
from linearize.report.results import STUDENT, StageResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

# tokens to average over in a suite without perplexity
DEFAULT_TOKENS = 2048


class BranchShare(Measurement):
    """Share of the recurrent branch, |recurrent| / (|window| + |recurrent|), by layer and head.

    Perplexity and recall look at this option, too: at their longest length and distance they measure the student with
    its window off.
    """

    name = "branch"
    options = (Option("branch", bool, False, suites=dict.fromkeys(("quick", "standard", "full"), True)),)

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        if suite.branch:
            tokens = max(suite.lengths, default=DEFAULT_TOKENS)
            yield Stage("branch", partial(measure_branch_share, length=tokens))


def measure_branch_share(context: EvaluationContext, length: int) -> StageResult:
    """Average the branch's share over one window of text, of `length` tokens as far as text and positions go.

    The table has one row a layer: the key/value heads with softmax, and the shares of the linear ones' query heads.
    """
    return context.for_each_model([STUDENT], lambda name, model: _shares(context, model, length))[STUDENT]


def _shares(context: EvaluationContext, model: PreTrainedModel, length: int) -> StageResult:
    from linearize.modeling.linear_heads import LinearHeads

    positions = model.config.max_position_embeddings or length
    ids = context.text[: min(length, positions)][None].to(context.device)
    branches = [module for module in model.modules() if isinstance(module, LinearHeads)]
    for branch in branches:
        branch.shares = []
    try:
        model.base_model(ids, use_cache=False)
        rows = [_row(attention) for _, attention in model.linear_attentions()]
    finally:
        for branch in branches:
            branch.shares = None
    context.progress("branch share: measured")
    return StageResult(tables={"branch_share": rows})


def _row(attention: Any) -> dict[str, Any]:
    import torch

    shares: dict[int, list[float]] = {}
    if attention.mixer is not None and attention.mixer.shares:
        per_head = torch.stack(attention.mixer.shares).mean(0).view(len(attention.linear_heads), -1)
        shares = dict(zip(attention.linear_heads, per_head.tolist()))
    return {
        "layer": attention.layer_idx,
        "softmax_heads": list(attention.softmax_heads),
        "shares": {str(head): shares.get(head, []) for head in attention.linear_heads},
    }


MEASUREMENT = BranchShare()
