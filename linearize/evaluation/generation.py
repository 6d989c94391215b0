"""Whether free-running text is healthy: repetition, variety, length, stopping. Greedy, through the cache."""

import itertools

import torch

from linearize.evaluation.lab import Lab

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


def prompt_ids(lab: Lab, prompt: str) -> torch.Tensor:
    """[1, T], through the chat template where there is one."""
    if lab.tokenizer.chat_template:
        encoded = lab.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"].to(lab.device)
    return lab.tokenizer(prompt, return_tensors="pt").input_ids.to(lab.device)


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
