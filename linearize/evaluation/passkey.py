"""Hide a number in text and ask for it at the end: a needle in a haystack, answered by generation through the cache.

The haystack is the evaluation text. The needle stands at a depth of the context: 0 is its start, 1 its end. A dozen
prompts say little about how often the answer is right. The cross-entropy of the number, in nats a token, says more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from linearize.evaluation.measurement import COMPARISONS, Measurement, Option, Stage
from linearize.report.results import ANSWERING_MODELS, StageResult, make_metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

DEPTHS = (0.1, 0.5, 0.9)
# five digits are at most this many tokens, the space before them included
ANSWER_TOKENS = 8
QUESTION = "\nWhat is the pass key? The pass key is"


class Passkey(Measurement):
    """Share of hidden numbers that are named, and the cross-entropy of the number."""

    name = "passkey"
    options = (
        # least: needle and question alone take some fifty tokens
        Option("passkey", int, (), least=64, suites={"standard": (1024, 4096), "full": (1024, 4096, 16384)}),
        Option("passkey_rows", int, 2, least=1, suites={"full": 4}),
    )

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        fields = suite.models(ANSWERING_MODELS) | COMPARISONS
        return {f"{kind}@{length}": fields for length in suite.passkey for kind in ("passkey", "passkey_loss")}

    def window_tokens(self, suite: Suite) -> int:
        return max(suite.passkey, default=0)

    def text_tokens(self, suite: Suite) -> int:
        return suite.passkey_rows * self.window_tokens(suite)

    def positions(self, item: int) -> int:
        return item + ANSWER_TOKENS

    def stages(self, suite: Suite, inputs: Any) -> Iterator[Stage]:
        for length in suite.passkey:
            yield Stage(f"passkey@{length}", partial(measure_passkey, length=length, rows=suite.passkey_rows))


@dataclass(frozen=True)
class PasskeyTask:
    """Prompts of one length and depth.

    Attributes:
        prompts: token ids [T] each.
        answers: the digits that answer each prompt.
        continuations: the answer as the tokens [N] that would follow each prompt.
    """

    prompts: list[Tensor]
    answers: list[str]
    continuations: list[Tensor]


def passkey_task(context: EvaluationContext, length: int, depth: float, rows: int) -> PasskeyTask:
    """Make `rows` prompts of about `length` tokens with the needle at `depth`, each from another part of the text."""
    import torch

    generator = torch.Generator().manual_seed(context.seed * 7919 + length + int(100 * depth))
    tokenizer, text = context.tokenizer, context.text

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    question = encode(QUESTION)
    prompts, answers, continuations = [], [], []
    for row in range(rows):
        number = str(int(torch.randint(10_000, 100_000, (1,), generator=generator)))
        needle = encode(f" The pass key is {number}. Remember it. {number} is the pass key.\n")
        room = max(0, length - len(needle) - len(question) - len(start))
        offset = (row * room) % max(1, text.numel() - room)
        hay = text[offset : offset + room].tolist()
        cut = int(depth * len(hay))
        prompts.append(torch.tensor([*start, *hay[:cut], *needle, *hay[cut:], *question]))
        answers.append(number)
        continuations.append(torch.tensor(encode(f"{QUESTION} {number}")[len(question) :]))
    return PasskeyTask(prompts, answers, continuations)


def measure_passkey(context: EvaluationContext, length: int, rows: int) -> StageResult:
    """Measure how often a greedy continuation names the number, in all and by depth, and the number's cross-entropy."""
    tasks = [passkey_task(context, length, depth, rows) for depth in DEPTHS]
    prompts = [prompt for task in tasks for prompt in task.prompts]
    answers = [answer for task in tasks for answer in task.answers]
    continuations = [continuation for task in tasks for continuation in task.continuations]

    def score(name: str, model: PreTrainedModel) -> tuple[list[float], list[float]]:
        replies = context.greedy(model, prompts, ANSWER_TOKENS)
        context.progress(f"passkey@{length}: {name} has answered")
        hits = [float(answer in context.tokenizer.decode(ids)) for answer, (ids, _) in zip(answers, replies)]
        losses = [_loss(context, name, model, *pair) for pair in zip(prompts, continuations)]
        context.progress(f"passkey@{length}: {name}")
        return hits, losses

    scores = context.for_each_model(ANSWERING_MODELS, score)
    hits = {name: hits for name, (hits, _) in scores.items()}
    losses = {name: losses for name, (_, losses) in scores.items()}
    table = []
    for i, depth in enumerate(DEPTHS):
        shares = {name: sum(values[i * rows : (i + 1) * rows]) / rows for name, values in hits.items()}
        table.append({"length": length, "depth": depth, **shares})
    metrics = (
        make_metric(f"passkey@{length}", "higher", hits, items=True),
        make_metric(f"passkey_loss@{length}", "lower", losses),
    )
    return StageResult(metrics=metrics, tables={f"passkey@{length}": table})


def _loss(context: EvaluationContext, name: str, model: PreTrainedModel, prompt: Tensor, continuation: Tensor) -> float:
    """Return the mean cross-entropy of the continuation [N] after the prompt [T], in nats a token."""
    import torch
    from torch.nn import functional as F

    from linearize.evaluation.context import final_hidden
    from linearize.modeling.readout import readout_of

    ids = torch.cat([prompt, continuation]).to(context.device)
    states = final_hidden(name, model, ids[None])[0, -continuation.numel() - 1 : -1]
    return F.cross_entropy(readout_of(model)(states), ids[-continuation.numel() :]).item()


MEASUREMENT = Passkey()
