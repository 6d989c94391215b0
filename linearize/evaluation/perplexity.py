"""Measure perplexity at given lengths and by position, and how far each model diverges from the base.

Text is cut into windows of `length` tokens, and each window is predicted from its own start. The standard error is over
windows, because tokens of one window are not independent. Perplexity per word (split at white space) and per byte does
not depend on the tokenizer.

With y the tokens of a window, p the base's distribution and q the model's:

    perplexity = exp(mean -log q(y))        kl = mean Σ p (log p - log q)        agreement = mean [argmax p = argmax q]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import COMPARISONS, Measurement, Option, Stage
from linearize.report.results import BASE, SCORED_MODELS, WINDOW_OFF, Metric, StageResult, make_metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite
    from linearize.evaluation.window_scores import WindowScores


class Perplexity(Measurement):
    """Perplexity per token, word and byte, bits per byte, and KL divergence from and agreement with the base."""

    name = "perplexity"
    options = (
        Option(
            "lengths", int, (512, 2048), least=2,
            suites={
                "quick": (2048,), "standard": (512, 2048, 8192), "full": (512, 1024, 2048, 4096, 8192, 16384, 32768),
            },
        ),
        Option("max_tokens", int, 16384, least=1, suites={"quick": 4096, "standard": 32768, "full": 131072}),
    )  # fmt: skip

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        models = suite.models(SCORED_MODELS)
        metrics = {}
        for length in suite.lengths:
            window_off = {WINDOW_OFF} if _measures_window_off(suite, length) else set()
            for kind in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
                metrics[f"{kind}@{length}"] = models | COMPARISONS | window_off
            for kind in ("kl", "agreement"):
                metrics[f"{kind}@{length}"] = models - {BASE} | window_off
        return metrics

    def window_tokens(self, suite: Suite) -> int:
        return max(suite.lengths, default=0)

    def text_tokens(self, suite: Suite) -> int:
        return suite.max_tokens

    def positions(self, item: int) -> int:
        return item

    def cut_to_positions(self, items: tuple[int, ...], limit: int) -> tuple[int, ...]:
        # one length stays, as long as the positions
        return super().cut_to_positions(items, limit) or (limit,)

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        for length in suite.lengths:
            settings = {"max_tokens": suite.max_tokens, "window_off": _measures_window_off(suite, length)}
            yield Stage(f"perplexity@{length}", partial(measure_perplexity, length=length, **settings))


def _measures_window_off(suite: Suite, length: int) -> bool:
    """Return True if the student with its window off is measured too: at the longest length of suites with `branch`."""
    return suite.branch and length == max(suite.lengths)


def measure_perplexity(context: EvaluationContext, length: int, max_tokens: int, *, window_off: bool) -> StageResult:
    """Score consecutive windows under every model.

    Args:
        length: tokens of a window.
        max_tokens: tokens of all windows together; one window at least.
        window_off: score the student with its window off, too.
    """
    from linearize.evaluation.context import MODES, final_hidden
    from linearize.evaluation.window_scores import BaseOutputs, WindowScores, score_window, windows_of
    from linearize.modeling.readout import readout_of

    names = context.available([*SCORED_MODELS, *[WINDOW_OFF] * window_off])
    scores = {name: WindowScores() for name in names}
    windows = windows_of(context.text, length, max_tokens)
    base_outputs = BaseOutputs(context.work / f"base-{length}", len(windows), on_disk=not context.all_in_memory)

    def score(models: dict[str, PreTrainedModel]) -> None:
        for i, window in enumerate(windows):
            ids = window.to(context.device)
            outputs = {}
            for name, model in models.items():
                with MODES[name].enter(model):
                    outputs[name] = (final_hidden(name, model, ids[None])[0], readout_of(model))
            if BASE in outputs:
                base_outputs.store(i, *outputs[BASE])
            score_window(ids, base_outputs.load(i, context.device), outputs, scores)
            context.report_every_fourth(f"perplexity@{length}", i + 1, len(windows))

    try:
        context.for_each_weight_set(names, score)
    finally:
        base_outputs.clear()
    positions = {f"perplexity@{length}": _by_position(length, scores)}
    return StageResult(metrics=_metrics(context, length, windows, scores), positions=positions)


def _metrics(
    context: EvaluationContext, length: int, windows: Tensor, scores: dict[str, WindowScores]
) -> tuple[Metric, ...]:
    texts = [context.tokenizer.decode(window[1:], skip_special_tokens=True) for window in windows]
    nats = {name: [x.sum().item() for x in score.losses] for name, score in scores.items()}
    # divided by the mean over all windows, so that the mean of the quotients is the sum of nats by the sum of units
    words = max(1, sum(len(text.split()) for text in texts)) / len(texts)
    size = max(1, sum(len(text.encode()) for text in texts)) / len(texts)

    def per(units: float) -> dict[str, list[float]]:
        return {name: [value / units for value in values] for name, values in nats.items()}

    others = {name: score for name, score in scores.items() if name != BASE}
    return (
        make_metric(f"perplexity@{length}", "lower", per(length - 1), exponentiate=True),
        make_metric(f"word_perplexity@{length}", "lower", per(words), exponentiate=True),
        make_metric(f"byte_perplexity@{length}", "lower", per(size), exponentiate=True),
        make_metric(f"bits_per_byte@{length}", "lower", per(size * math.log(2))),
        make_metric(f"kl@{length}", "lower", {name: score.kl for name, score in others.items()}),
        make_metric(f"agreement@{length}", "higher", {name: score.agreement for name, score in others.items()}),
    )


def _by_position(length: int, scores: dict[str, WindowScores]) -> list[dict[str, float]]:
    import torch

    losses = {name: torch.stack(score.losses) for name, score in scores.items()}
    rows = []
    for start, end in position_buckets(length):
        # position p is the p-th token after the first
        means = {name: values[:, start - 1 : end - 1].mean().exp().item() for name, values in losses.items()}
        rows.append({"start": start, "end": end, **means})
    return rows


def position_buckets(length: int) -> Iterator[tuple[int, int]]:
    """Yield position ranges [start, end) that double towards the end: the first 64, then 64 to 128, and so on."""
    start, end = 1, 64
    while start < length:
        yield start, min(end, length)
        start, end = end, end * 2


MEASUREMENT = Perplexity()
