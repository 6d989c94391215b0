"""A number hidden in text, asked for at the end: needle in a haystack, answered by generation through the cache.

The haystack is the evaluation text; the needle stands at a depth of the context (0 its start, 1 its end).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.evaluation.lab import Lab
from linearize.report.results import BASE, CONTROL, STUDENT, UNIFORM, WINDOW, Findings, make_metric

DEPTHS = (0.1, 0.5, 0.9)
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class PasskeyTask:
    """Prompts [T] and the digits that answer them."""

    prompts: list[Tensor]
    answers: list[str]


def passkey_task(lab: Lab, length: int, depth: float, rows: int) -> PasskeyTask:
    """`rows` prompts of about `length` tokens with the needle at `depth`, each from another stretch of the text."""
    generator = torch.Generator().manual_seed(lab.seed * 7919 + length + int(100 * depth))
    tokenizer = lab.tokenizer
    prompts, answers = [], []
    for row in range(rows):
        number = str(int(torch.randint(10_000, 100_000, (1,), generator=generator)))
        needle = tokenizer(f" The pass key is {number}. Remember it. {number} is the pass key.\n").input_ids
        question = tokenizer("\nWhat is the pass key? The pass key is").input_ids
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        room = max(0, length - len(needle) - len(question) - len(start))
        offset = (row * room) % max(1, lab.text.numel() - room)
        hay = lab.text[offset : offset + room].tolist()
        cut = int(depth * len(hay))
        prompts.append(torch.tensor([*start, *hay[:cut], *needle, *hay[cut:], *question]))
        answers.append(number)
    return PasskeyTask(prompts, answers)


def measure_passkey(lab: Lab, length: int, rows: int) -> Findings:
    """Share of prompts whose greedy continuation names the number, in all and by depth."""
    tasks = [passkey_task(lab, length, depth, rows) for depth in DEPTHS]
    prompts = [prompt for task in tasks for prompt in task.prompts]
    answers = [answer for task in tasks for answer in task.answers]

    def right(name: str, model: PreTrainedModel) -> list[float]:
        produced = lab.greedy(model, prompts, ANSWER_TOKENS)
        lab.progress(f"passkey@{length}: {name}")
        return [float(answer in lab.tokenizer.decode(ids)) for answer, (ids, _) in zip(answers, produced)]

    units = lab.measure([BASE, STUDENT, WINDOW, UNIFORM, CONTROL], right)
    table = [
        {
            "length": length,
            "depth": depth,
            **{name: sum(values[i * rows : (i + 1) * rows]) / rows for name, values in units.items()},
        }
        for i, depth in enumerate(DEPTHS)
    ]
    metric = make_metric(f"passkey@{length}", "higher", units, items=True)
    return Findings(metrics=(metric,), tables={f"passkey@{length}": table})
