"""Compute the same logits in five ways, which must agree: cached, in pieces, padded, in a batch, after saving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.work_folder import temporary_folder
from linearize.checkpoint.writing import check_space
from linearize.errors import ResourceError
from linearize.evaluation.measurement import Measurement, Option, Stage
from linearize.report.results import STUDENT, Check, StageResult

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

# text is this many tokens longer than the longest window, and at least this long, so that every branch is used
TOKENS_BEYOND_WINDOW, LEAST_TOKENS = 48, 400
# positions that stay free behind the text, for padding
SPARE_POSITIONS = 16


class Parity(Measurement):
    """Agreement of a student's logits with themselves, however they are computed."""

    name = "parity"
    options = (Option("parity", bool, False, suites=dict.fromkeys(("quick", "standard", "full"), True)),)

    def window_tokens(self, suite: Suite) -> int:
        return 16 if suite.parity else 0

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        if suite.parity:
            yield Stage("parity", measure_parity)


def measure_parity(context: EvaluationContext) -> StageResult:
    """Run five checks of the student, on text longer than its window where positions allow."""
    return context.for_each_model([STUDENT], lambda name, model: _checks(context, model))[STUDENT]


def _checks(context: EvaluationContext, model: PreTrainedModel) -> StageResult:
    import torch

    from linearize.modeling.agreement import TOLERANCES, difference, logits_behind_padding, logits_in_pieces

    length = _length(context, model)
    ids = context.text[:length][None].to(context.device)
    other = context.text[-length:][None].to(context.device)
    whole, whole_other = (model(x, use_cache=False).logits for x in (ids, other))
    tolerance = TOLERANCES[whole.dtype]
    third = length // 3
    pairs = {
        "cached = uncached": (logits_in_pieces(model, ids, [length - 8] + [1] * 8), whole),
        "chunked prefill = whole": (logits_in_pieces(model, ids, [third, third, length - 2 * third]), whole),
        "padded = unpadded": (logits_behind_padding(model, ids), whole),
        "batch = single": (
            model(torch.cat([ids, other]), use_cache=False).logits,
            torch.cat([whole, whole_other]),
        ),
    }
    checks = [Check(name, difference(a, b), tolerance) for name, (a, b) in pairs.items()]
    notes: list[str] = []
    try:
        checks.append(Check("saved and loaded = before", difference(_logits_after_saving(model, ids), whole), 0.0))
    except ResourceError as error:
        notes.append(f"parity after saving was not checked: {error}")
    context.progress(f"parity: {len(checks)} checks")
    return StageResult(checks=tuple(checks), notes=tuple(notes))


def _length(context: EvaluationContext, model: PreTrainedModel) -> int:
    """Return the number of tokens to compare: beyond every window, as far as text and positions go."""
    most = min(context.text.numel(), model.config.max_position_embeddings - SPARE_POSITIONS)
    layers = [layer for layer in model.config.plan.layers if not layer.native]
    windows = [layer.window + layer.sinks for layer in layers]
    # the softmax heads' own window counts where there is anything beyond it
    softmax_window = max((layer.softmax_window or 0) + layer.sinks for layer in layers) if layers else 0
    if softmax_window + TOKENS_BEYOND_WINDOW <= most:
        windows.append(softmax_window)
    return min(max(LEAST_TOKENS, max(windows, default=0) + TOKENS_BEYOND_WINDOW), most)


def _logits_after_saving(model: Any, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with temporary_folder("parity") as folder:
        check_space(folder, model.get_memory_footprint())
        model.save_pretrained(folder)
        reloaded = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
            .to(ids.device)
            .eval()
        )
        return reloaded(ids, use_cache=False).logits


MEASUREMENT = Parity()
