"""Measure perplexity at given lengths and by position, and how far each model diverges from the base.

Text is cut into windows of `length` tokens, and each window is predicted from its own start. These windows of text have
nothing to do with the window of attention. The standard error is over windows, because tokens of one window are not
independent. Perplexity per word (split at white space) and per byte does not depend on the tokenizer.

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
            # these compare a model with the base already: the base has no value, and nothing is compared again
            for kind in ("kl", "agreement"):
                metrics[f"{kind}@{length}"] = (models - {BASE}) | window_off
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
        length: tokens of a window of text.
        max_tokens: tokens of all windows together; one window at least.
        window_off: score the student with its window off, too.
    """
    from linearize.evaluation.context import MODES, final_hidden
    from linearize.evaluation.window_scores import BaseOutputs, WindowScores, score_window, windows_of
    from linearize.modeling.readout import readout_of

    names = context.available([*SCORED_MODELS, WINDOW_OFF] if window_off else SCORED_MODELS)
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
    """Make the metrics of one length from the scores of its windows [windows, length]."""
    # the first token of a window is not predicted
    texts = [context.tokenizer.decode(window[1:], skip_special_tokens=True) for window in windows]
    nats = {name: [x.sum().item() for x in score.losses] for name, score in scores.items()}
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    # Each window's nats are divided by the mean word (byte) count of a window, not by its own: then the mean over
    # windows is all nats by all words (bytes).
    words_per_window = max(1, words) / len(texts)
    bytes_per_window = max(1, size) / len(texts)

    def nats_per(units_per_window: float) -> dict[str, list[float]]:
        return {name: [value / units_per_window for value in values] for name, values in nats.items()}

    all_but_base = {name: score for name, score in scores.items() if name != BASE}
    return (
        make_metric(f"perplexity@{length}", "lower", nats_per(length - 1), exponentiate=True),
        make_metric(f"word_perplexity@{length}", "lower", nats_per(words_per_window), exponentiate=True),
        make_metric(f"byte_perplexity@{length}", "lower", nats_per(bytes_per_window), exponentiate=True),
        # nats / ln 2 = bits
        make_metric(f"bits_per_byte@{length}", "lower", nats_per(bytes_per_window * math.log(2))),
        make_metric(f"kl@{length}", "lower", {name: score.kl for name, score in all_but_base.items()}),
        make_metric(f"agreement@{length}", "higher", {name: score.agreement for name, score in all_but_base.items()}),
    )


def _by_position(length: int, scores: dict[str, WindowScores]) -> list[dict[str, float]]:
    """Return the perplexity of every model over each range of `position_buckets`, a row for each."""
    import torch

    losses = {name: torch.stack(score.losses) for name, score in scores.items()}
    rows = []
    for start, end in position_buckets(length):
        # losses[:, i] is the loss of token i + 1, since the first token is not predicted
        perplexities = {name: values[:, start - 1 : end - 1].mean().exp().item() for name, values in losses.items()}
        rows.append({"start": start, "end": end, **perplexities})
    return rows


def position_buckets(length: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of positions [start, end), each twice as long as the one before: 1 to 64, 64 to 128, and so on.

    Position 0 is left out, since the first token is not predicted.
    """
    start, end = 1, 64
    while start < length:
        yield start, min(end, length)
        start, end = end, end * 2


MEASUREMENT = Perplexity()
