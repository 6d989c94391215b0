"""Multiple choice answered by letter (as MMLU is asked), with the options permuted so that a habit of some letter shows.

A file's rows hold `query`, `choices` and `gold` (an index). Every item is asked once for each rotation of its options, so
that each option, the right one too, stands once at every letter: a model without a habit chooses all letters equally often.
An item's figure is the share of its rotations that were answered right; it is consistent when every rotation drew the
same option.
"""

import json
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.checkpoint.fingerprint import sha256
from linearize.data.documents import prompt_tokens
from linearize.errors import ConfigError
from linearize.evaluation.lab import BATCH_TOKENS, Lab, final_hidden, require_finite
from linearize.evaluation.suite import metric_stem
from linearize.modeling.readout import readout_of
from linearize.report.results import ASKED, Findings, make_metric

HEAD = "The following is a multiple choice question. Answer with the letter of the right option.\n\n"


@dataclass(frozen=True)
class Item:
    query: str
    choices: tuple[str, ...]
    gold: int


def read_items(path: Path, limit: int | None) -> list[Item]:
    """The first `limit` items of a .jsonl file.

    Raises:
        ConfigError: no such file, none or malformed rows.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--choice: no text file '{path}'") from None
    items = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["choices"], list) or type(row["gold"]) is not int:
                raise TypeError
            item = Item(str(row["query"]), tuple(map(str, row["choices"])), row["gold"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--choice: line {number} of {path} is not an item; needed are query, choices (a list) and gold (a "
                "whole number)"
            ) from None
        if not (2 <= len(item.choices) <= len(string.ascii_uppercase) and 0 <= item.gold < len(item.choices)):
            raise ConfigError(
                f"--choice: line {number} of {path} has {len(item.choices)} choices and gold {item.gold}; allowed are 2 to "
                "26 choices, and gold an index of them"
            )
        items.append(item)
    if not items:
        raise ConfigError(f"--choice: {path} holds no items")
    return items


def measure_letters(lab: Lab, path: Path, limit: int | None) -> Findings:
    """Accuracy, consistency and the letters chosen, of base, student, window + sinks and the baselines asked for."""
    stem = metric_stem(str(path))
    items = read_items(path, limit)
    asked = [_rotations(lab, item) for item in items]

    def letters(name: str, model: PreTrainedModel) -> list[list[int]]:
        found = []
        for number, (rows, allowed) in enumerate(asked):
            found.append(_chosen(lab, name, model, rows, allowed))
            if (number + 1) % 50 == 0 or number + 1 == len(asked):
                lab.progress(f"letters_{stem}: {name}, {number + 1} of {len(asked)}")
        return found

    chosen = lab.measure(ASKED, letters)
    right, consistent = {}, {}
    for name, found in chosen.items():
        drawn = [
            [option_at(letter, rotation, len(item.choices)) for rotation, letter in enumerate(row)]
            for item, row in zip(items, found)
        ]
        right[name] = [row.count(item.gold) / len(row) for item, row in zip(items, drawn)]
        consistent[name] = [float(len(set(row)) == 1) for row in drawn]
    data = f"{path.name} {sha256(path)[:16]}, {len(items)} items"
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return Findings(
        metrics=(
            make_metric(f"letters_{stem}", "higher", right, chance=chance, data=data),
            make_metric(f"letters_consistent_{stem}", "higher", consistent, items=True, data=data),
        ),
        tables={f"letters@{stem}": _histogram(items, chosen)},
    )


def option_at(letter: int, rotation: int, choices: int) -> int:
    """Which option stands at a letter in a rotation."""
    return (letter + rotation) % choices


def question(item: Item, rotation: int) -> str:
    count = len(item.choices)
    options = [item.choices[option_at(letter, rotation, count)] for letter in range(count)]
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    return f"{HEAD}{item.query.strip()}\n" + "\n".join(lines) + "\nAnswer:"


def _rotations(lab: Lab, item: Item) -> tuple[list[Tensor], Tensor]:
    """Token ids up to the answer's letter for every rotation, and the letters' token ids."""
    letters = string.ascii_uppercase[: len(item.choices)]
    # the letter's own token is the last one of the whole text, whatever the tokenizer makes of the space before it
    allowed = [prompt_tokens(lab.tokenizer, f"Answer: {letter}")[-1] for letter in letters]
    if len(set(allowed)) < len(letters):
        raise ConfigError(
            "--choice: the tokenizer does not end the text 'Answer: A' in a token of its own for every letter"
        )
    rows = [
        torch.tensor(prompt_tokens(lab.tokenizer, f"{question(item, rotation)} {letters[0]}")[:-1])
        for rotation in range(len(letters))
    ]
    return rows, torch.tensor(allowed)


def _chosen(lab: Lab, name: str, model: PreTrainedModel, rows: list[Tensor], allowed: Tensor) -> list[int]:
    """The most likely letter for every row. Padding on the right is out of sight of a row's last token."""
    readout, allowed = readout_of(model), allowed.to(lab.device)
    width = max(row.numel() for row in rows)
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : row.numel()] = row
    last = torch.tensor([row.numel() - 1 for row in rows])
    letters = []
    for ids, ends in zip(padded.split(size := max(1, BATCH_TOKENS // width)), last.split(size)):
        hidden = final_hidden(name, model, ids.to(lab.device))
        logits = readout(hidden[torch.arange(len(ids)), ends.to(lab.device)])[:, allowed]
        require_finite(name, logits[None])
        letters += logits.argmax(-1).tolist()
    return letters


def _histogram(items: list[Item], chosen: dict[str, list[list[int]]]) -> list[dict]:
    """One row a letter: the share of questions it was right for, and of those each model answered with it."""
    asked = sum(len(item.choices) for item in items)
    right = Counter(letter for item in items for letter in range(len(item.choices)))
    counts = {name: Counter(letter for row in found for letter in row) for name, found in chosen.items()}
    return [
        {
            "letter": string.ascii_uppercase[letter],
            "right": right[letter] / asked,
            **{name: count[letter] / asked for name, count in counts.items()},
        }
        for letter in sorted(right)
    ]
