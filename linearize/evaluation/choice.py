"""Ask multiple-choice questions by letter, as MMLU does, with the options rotated so that a bias to a letter shows.

A file's rows have `query`, `choices` and `gold` (an index). Every item is asked once for each rotation of its options,
so that each option stands once at every letter. A model without a bias then chooses all letters equally often.
An item's score is the share of its rotations with the right answer. It is consistent if every rotation has the same
option for an answer.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.fingerprint import sha256
from linearize.errors import ConfigError
from linearize.evaluation.measurement import COMPARISONS, Measurement, Option, Stage, metric_stem
from linearize.report.results import ANSWERING_MODELS, StageResult, make_metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

INSTRUCTION = "The following is a multiple choice question. Answer with the letter of the right option.\n\n"
# items between two lines of progress
PROGRESS_ITEMS = 50

# bytes of a file of items
LARGEST_FILE = 1 << 30


class Choice(Measurement):
    """Accuracy and consistency of answers by letter, and a histogram of letters. `task_limit` belongs to tasks."""

    name = "choice"
    options = (Option("choice", str, ()),)

    def metrics(self, suite: Suite) -> dict[str, set[str]]:
        fields = suite.models(ANSWERING_MODELS) | COMPARISONS
        metrics = {}
        for path in suite.choice:
            metrics[f"letters_{metric_stem(path)}"] = fields | {"recovery_over_chance"}
            metrics[f"letters_consistent_{metric_stem(path)}"] = fields
        return metrics

    def check(self, suite: Suite) -> None:
        stems = [metric_stem(path) for path in suite.choice]
        for path, stem in zip(suite.choice, stems):
            if stems.count(stem) > 1:
                raise ConfigError(
                    f"--choice: got '{path}' and another file whose figures would be named letters_{stem}, too"
                )

    def prepare(self, suite: Suite) -> dict[str, list[Item]]:
        return {path: read_items(Path(path), suite.task_limit) for path in suite.choice}

    def fingerprint(self, suite: Suite, inputs: dict[str, list[Item]]) -> list[str]:
        return [sha256(Path(path)) for path in inputs]

    def stages(self, suite: Suite, inputs: dict[str, list[Item]]) -> Iterator[Stage]:
        for path, items in inputs.items():
            yield Stage(f"choice {path}", partial(measure_choice, path=Path(path), items=items))


@dataclass(frozen=True)
class Item:
    """A question with its options; `gold` is the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


def read_items(path: Path, limit: int | None) -> list[Item]:
    """Read the first `limit` items of a .jsonl file, all for None.

    Raises:
        ConfigError: there is no such file, or it has no items, or malformed ones.
    """
    try:
        if path.is_file() and (size := path.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"--choice: {path} has {size:,} bytes, at most {LARGEST_FILE:,} are read")
        # str.splitlines would break rows at U+2028, which JSON allows in strings
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--choice: no text file '{path}'") from None
    if not lines:
        raise ConfigError(f"--choice: {path} holds no items")
    return [_read_item(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1)]


def _read_item(line: str, place: str) -> Item:
    try:
        row = json.loads(line)
        if not isinstance(row["choices"], list) or type(row["gold"]) is not int:
            raise TypeError
        item = Item(str(row["query"]), tuple(map(str, row["choices"])), row["gold"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--choice: {place} is not an item; needed are query, choices (a list) and gold (a whole number)"
        ) from None
    if not (2 <= len(item.choices) <= len(string.ascii_uppercase) and 0 <= item.gold < len(item.choices)):
        raise ConfigError(
            f"--choice: {place} has {len(item.choices)} choices and gold {item.gold}; allowed are 2 to 26 choices, and "
            "gold an index of them"
        )
    return item


def measure_choice(context: EvaluationContext, path: Path, items: list[Item]) -> StageResult:
    """Ask every model every rotation of every item; measure accuracy and consistency, and count the letters."""
    stem = metric_stem(str(path))
    questions = [_rotations(context, item) for item in items]

    def answer(name: str, model: PreTrainedModel) -> list[list[int]]:
        letters = []
        for number, (rows, letter_ids) in enumerate(questions, start=1):
            letters.append(_likeliest_letters(context, name, model, rows, letter_ids))
            if number % PROGRESS_ITEMS == 0 or number == len(questions):
                context.progress(f"letters_{stem}: {name}, {number} of {len(questions)}")
        return letters

    letters_by_model = context.for_each_model(ANSWERING_MODELS, answer)
    accuracy, consistency = {}, {}
    for name, letters in letters_by_model.items():
        options = [_options_of(item, rotations) for item, rotations in zip(items, letters)]
        accuracy[name] = [row.count(item.gold) / len(row) for item, row in zip(items, options)]
        consistency[name] = [float(len(set(row)) == 1) for row in options]
    data = f"{path.name} {sha256(path)[:16]}, {len(items)} items"
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return StageResult(
        metrics=(
            make_metric(f"letters_{stem}", "higher", accuracy, chance=chance, data=data),
            make_metric(f"letters_consistent_{stem}", "higher", consistency, items=True, data=data),
        ),
        tables={f"letters@{stem}": _histogram(items, letters_by_model)},
    )


def option_at(letter: int, rotation: int, choices: int) -> int:
    """Return the index of the option that stands at a letter in a rotation of `choices` options."""
    return (letter + rotation) % choices


def _options_of(item: Item, letters: list[int]) -> list[int]:
    """Return the options that stand at the letters chosen, one letter a rotation."""
    return [option_at(letter, rotation, len(item.choices)) for rotation, letter in enumerate(letters)]


def question(item: Item, rotation: int) -> str:
    """Return the prompt of one rotation, up to the space before the answer's letter."""
    count = len(item.choices)
    options = [item.choices[option_at(letter, rotation, count)] for letter in range(count)]
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    return f"{INSTRUCTION}{item.query.strip()}\n" + "\n".join(lines) + "\nAnswer:"


def _rotations(context: EvaluationContext, item: Item) -> tuple[list[Tensor], Tensor]:
    """Return the token ids up to the answer's letter for every rotation, and the letters' token ids."""
    import torch

    from linearize.data.documents import prompt_tokens

    letters = string.ascii_uppercase[: len(item.choices)]
    # the letter's own token is the last one of the whole text, whatever the tokenizer makes of the space before it
    letter_ids = [prompt_tokens(context.tokenizer, f"Answer: {letter}")[-1] for letter in letters]
    if len(set(letter_ids)) < len(letters):
        raise ConfigError(
            "--choice: the tokenizer does not end the text 'Answer: A' in a token of its own for every letter"
        )
    rows = [
        torch.tensor(prompt_tokens(context.tokenizer, f"{question(item, rotation)} {letters[0]}")[:-1])
        for rotation in range(len(letters))
    ]
    return rows, torch.tensor(letter_ids)


def _likeliest_letters(
    context: EvaluationContext, name: str, model: PreTrainedModel, rows: list[Tensor], letter_ids: Tensor
) -> list[int]:
    """Return the most likely letter after every row of ids [T]."""
    import torch

    from linearize.evaluation.context import BATCH_TOKENS, final_hidden, require_finite
    from linearize.modeling.readout import readout_of

    readout, letter_ids = readout_of(model), letter_ids.to(context.device)
    width = max(row.numel() for row in rows)
    # padding on the right is invisible to a row's last token
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : row.numel()] = row
    last = torch.tensor([row.numel() - 1 for row in rows])
    size = max(1, BATCH_TOKENS // width)
    letters: list[int] = []
    for ids, ends in zip(padded.split(size), last.split(size)):
        hidden = final_hidden(name, model, ids.to(context.device))
        logits = readout(hidden[torch.arange(len(ids)), ends.to(context.device)])[:, letter_ids]
        require_finite(name, logits[None])
        letters += logits.argmax(-1).tolist()
    return letters


def _histogram(items: list[Item], letters_by_model: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """Return one row a letter: the share of questions it was right for, and each model's share of answers with it."""
    questions = sum(len(item.choices) for item in items)
    right = Counter(letter for item in items for letter in range(len(item.choices)))
    counts = {name: Counter(letter for row in letters for letter in row) for name, letters in letters_by_model.items()}
    return [
        {
            "letter": string.ascii_uppercase[letter],
            "right": right[letter] / questions,
            **{name: count[letter] / questions for name, count in counts.items()},
        }
        for letter in sorted(right)
    ]


MEASUREMENT = Choice()
