"""Measure the health of free-running text: repetition, variety, length and stopping. Greedy, through the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import COMPARISONS, Measurement, Option, Stage
from linearize.report.results import ANSWERING_MODELS, StageResult, make_metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short letter to a friend about a walk in the mountains.",
    "List three things that a good bread needs.",
    "What is the difference between weather and climate?",
    "Tell a story about a lighthouse keeper and a storm.",
    "How does a bicycle stay upright?",
    "Give me advice on learning a new language.",
    "Describe the city of Paris to someone who has never been there.",
)
# metric -> the better direction
METRICS = {"repetition": "lower", "distinct2": "higher", "length": "higher", "stopped": "higher"}


class Generation(Measurement):
    """Health of greedy answers to eight prompts, with the texts side by side."""

    name = "generation"
    options = (Option("generation", int, 0, least=0, suites={"quick": 24, "standard": 128, "full": 256}),)

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        return dict.fromkeys(METRICS, suite.models(ANSWERING_MODELS) | COMPARISONS) if suite.generation else {}

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        if suite.generation:
            yield Stage("generation", partial(measure_generation, tokens=suite.generation))


def measure_generation(context: EvaluationContext, tokens: int) -> StageResult:
    """Measure the health of at most `tokens` new tokens after every prompt."""
    prompts = [prompt_ids(context, prompt) for prompt in PROMPTS]

    def answer(name: str, model: PreTrainedModel) -> list[tuple[list[int], bool]]:
        context.progress(f"generation: {name}")
        return context.greedy(model, prompts, tokens)

    answers = context.for_each_model(ANSWERING_MODELS, answer)
    scores = {name: [health(ids, stopped) for ids, stopped in replies] for name, replies in answers.items()}
    metrics = []
    for metric, better in METRICS.items():
        units = {name: [row[metric] for row in rows] for name, rows in scores.items()}
        metrics.append(make_metric(metric, better, units, data=f"{tokens} tokens"))
    samples = []
    for i, prompt in enumerate(PROMPTS):
        texts = {
            name: context.tokenizer.decode(replies[i][0], skip_special_tokens=True) for name, replies in answers.items()
        }
        samples.append({"prompt": prompt, **texts})
    return StageResult(metrics=tuple(metrics), tables={"samples": samples})


def prompt_ids(context: EvaluationContext, prompt: str) -> Tensor:
    """Return a prompt's token ids [T], through the chat template if the tokenizer has one."""
    import torch

    from linearize.data.documents import chat_text, prompt_tokens

    tokenizer = context.tokenizer
    if tokenizer.chat_template:
        text = chat_text(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return torch.tensor(prompt_tokens(tokenizer, prompt))


def health(tokens: list[int], stopped: bool) -> dict[str, float]:
    """Score one answer.

    Returns:
        repetition: share of 4-grams that occurred before. distinct2: share of different pairs of neighbours.
        length: tokens. stopped: 1 if the model ended the answer by itself.
    """
    fours = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    pairs = list(itertools.pairwise(tokens))
    return {
        "repetition": 1 - len(set(fours)) / len(fours) if fours else 0.0,
        "distinct2": len(set(pairs)) / len(pairs) if pairs else 1.0,
        "length": float(len(tokens)),
        "stopped": float(stopped),
    }


MEASUREMENT = Generation()
