"""Whether free-running text is healthy: repetition, variety, length, stopping. Greedy, through the cache."""

import itertools

import torch
from transformers import PreTrainedModel

from linearize.data.documents import chat_text, prompt_tokens
from linearize.evaluation.lab import Lab
from linearize.report.results import ASKED, Findings, make_metric

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


BETTER = {"repetition": "lower", "distinct2": "higher", "length": "higher", "stopped": "higher"}


def measure_generation(lab: Lab, tokens: int) -> Findings:
    """Health of at most `tokens` new tokens after every prompt, and the texts side by side."""
    prompts = [prompt_ids(lab, prompt) for prompt in PROMPTS]

    def answers(name: str, model: PreTrainedModel) -> list[tuple[list[int], bool]]:
        lab.progress(f"generation: {name}")
        return lab.greedy(model, prompts, tokens)

    produced = lab.measure(ASKED, answers)
    figures = {name: [health(*answer) for answer in found] for name, found in produced.items()}
    metrics = tuple(
        make_metric(
            key, better, {name: [row[key] for row in rows] for name, rows in figures.items()}, data=f"{tokens} tokens"
        )
        for key, better in BETTER.items()
    )
    samples = [
        {
            "prompt": prompt,
            **{name: lab.tokenizer.decode(found[i][0], skip_special_tokens=True) for name, found in produced.items()},
        }
        for i, prompt in enumerate(PROMPTS)
    ]
    return Findings(metrics=metrics, tables={"samples": samples})


def prompt_ids(lab: Lab, prompt: str) -> torch.Tensor:
    """[T], through the chat template where there is one."""
    if lab.tokenizer.chat_template:
        text = chat_text(lab.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        return torch.tensor(lab.tokenizer(text, add_special_tokens=False).input_ids)
    return torch.tensor(prompt_tokens(lab.tokenizer, prompt))


def health(tokens: list[int], stopped: bool) -> dict[str, float]:
    """repetition: share of 4-grams that came before; distinct2: share of different pairs; length; stopped."""
    fours = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    pairs = list(itertools.pairwise(tokens))
    return {
        "repetition": 1 - len(set(fours)) / len(fours) if fours else 0.0,
        "distinct2": len(set(pairs)) / len(pairs) if pairs else 1.0,
        "length": float(len(tokens)),
        "stopped": float(stopped),
    }
