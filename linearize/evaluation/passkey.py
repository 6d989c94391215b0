"""A number hidden in text, asked for at the end: needle in a haystack, answered by generation through the cache.

The haystack is the evaluation text; the needle stands at a depth of the context (0 its start, 1 its end). How often the
answer is right says little in a dozen prompts; what the number costs each model, in nats a token, says more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.evaluation.lab import Lab, final_hidden
from linearize.modeling.readout import readout_of
from linearize.report.results import ASKED, Findings, make_metric

DEPTHS = (0.1, 0.5, 0.9)
ANSWER_TOKENS = 8
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class PasskeyTask:
    """Prompts [T], the digits that answer them, and those as the tokens that would follow, [N]."""

    prompts: list[Tensor]
    answers: list[str]
    continuations: list[Tensor]


def passkey_task(lab: Lab, length: int, depth: float, rows: int) -> PasskeyTask:
    """`rows` prompts of about `length` tokens with the needle at `depth`, each from another stretch of the text."""
    generator = torch.Generator().manual_seed(lab.seed * 7919 + length + int(100 * depth))

    def encode(words: str) -> list[int]:
        return lab.tokenizer(words, add_special_tokens=False).input_ids

    start = [] if lab.tokenizer.bos_token_id is None else [lab.tokenizer.bos_token_id]
    question = encode(QUESTION)
    prompts, answers, continuations = [], [], []
    for row in range(rows):
        number = str(int(torch.randint(10_000, 100_000, (1,), generator=generator)))
        needle = encode(f" The pass key is {number}. Remember it. {number} is the pass key.\n")
        room = max(0, length - len(needle) - len(question) - len(start))
        offset = (row * room) % max(1, lab.text.numel() - room)
        hay = lab.text[offset : offset + room].tolist()
        cut = int(depth * len(hay))
        prompts.append(torch.tensor([*start, *hay[:cut], *needle, *hay[cut:], *question]))
        answers.append(number)
        continuations.append(torch.tensor(encode(f"{QUESTION} {number}")[len(question) :]))
    return PasskeyTask(prompts, answers, continuations)


def measure_passkey(lab: Lab, length: int, rows: int) -> Findings:
    """Share of prompts whose greedy continuation names the number, in all and by depth, and the number's cross-entropy."""
    tasks = [passkey_task(lab, length, depth, rows) for depth in DEPTHS]
    prompts = [prompt for task in tasks for prompt in task.prompts]
    answers = [answer for task in tasks for answer in task.answers]
    continuations = [continuation for task in tasks for continuation in task.continuations]

    def asked(name: str, model: PreTrainedModel) -> tuple[list[float], list[float]]:
        produced = lab.greedy(model, prompts, ANSWER_TOKENS)
        lab.progress(f"passkey@{length}: {name} has answered")
        right = [float(answer in lab.tokenizer.decode(ids)) for answer, (ids, _) in zip(answers, produced)]
        head, losses = readout_of(model), []
        for prompt, continuation in zip(prompts, continuations):
            ids = torch.cat([prompt, continuation]).to(lab.device)
            states = final_hidden(name, model, ids[None])[0, -continuation.numel() - 1 : -1]
            losses.append(F.cross_entropy(head(states), ids[-continuation.numel() :]).item())
        lab.progress(f"passkey@{length}: {name}")
        return right, losses

    found = lab.measure(ASKED, asked)
    units, losses = ({name: both[i] for name, both in found.items()} for i in (0, 1))
    table = [
        {
            "length": length,
            "depth": depth,
            **{name: sum(values[i * rows : (i + 1) * rows]) / rows for name, values in units.items()},
        }
        for i, depth in enumerate(DEPTHS)
    ]
    metrics = (
        make_metric(f"passkey@{length}", "higher", units, items=True),
        make_metric(f"passkey_loss@{length}", "lower", losses),
    )
    return Findings(metrics=metrics, tables={f"passkey@{length}": table})
