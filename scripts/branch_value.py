"""What the recurrent branch is worth: a student beside itself with the branch off and beside its base, token by token.

    python scripts/branch_value.py STUDENT... --text valid.txt --book book.txt

Perplexity ratios to the base at 512 and 2048 tokens of the text and in one window of the book, with the standard error of the
paired difference over stretches of 64 tokens, and copy recall. Every STUDENT has the same base.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from torch.nn import functional as F

from linearize.device import compute_dtype, keep_freed_memory
from linearize.evaluation.perplexity import windows_of
from linearize.evaluation.recall import accuracy, recall_task
from linearize.modeling.loading import load_student, load_tokenizer
from linearize.modeling.readout import readout_of

STRETCH, CHUNK, CHARACTERS_A_TOKEN = 64, 512, 8
SEED = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--distance", type=int, default=1024)
    arguments = parser.parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(arguments.students[0])

    def first(path: Path, count: int) -> torch.Tensor:
        return tokenizer(path.read_text(encoding="utf-8")[: CHARACTERS_A_TOKEN * count], return_tensors="pt").input_ids[
            0
        ]

    texts = [
        windows_of(first(arguments.text, arguments.tokens), 2048, arguments.tokens),
        windows_of(first(arguments.book, arguments.tokens), arguments.tokens, arguments.tokens),
    ]
    task = recall_task(arguments.distance, 4, len(tokenizer), tokenizer.bos_token_id, SEED)
    base = None
    for folder in arguments.students:
        model = load_student(folder, dtype=compute_dtype("auto"))
        modes = {"branch off": model.recurrent_branch_off, "student": contextlib.nullcontext}
        if base is None:
            modes = {"base": model.softmax_attention, **modes}
        for name, mode in modes.items():
            with mode(), torch.no_grad():
                found = [losses(model, windows) for windows in texts]
                recalled = [accuracy(hidden(model, row), readout_of(model), row, task.counted) for row in task.ids]
            base = base or found
            short, long, book = found[0][:, :512], *found
            ratios = [ratio(x, y) for x, y in zip((short, long, book), (base[0][:, :512], *base), strict=True)]
            print(f"{folder.name} {name}: 512 {ratios[0]}  2048 {ratios[1]}  book {ratios[2]}  "
                  f"recall@{arguments.distance} {sum(recalled) / len(recalled):.3f}", flush=True)  # fmt: skip


def hidden(model, row: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0]


def losses(model, windows: torch.Tensor) -> torch.Tensor:
    """Next-token losses [windows, length - 1]."""
    head, rows = readout_of(model), []
    for window in windows:
        parts = zip(hidden(model, window)[:-1].split(CHUNK), window[1:].split(CHUNK), strict=True)
        rows.append(torch.cat([F.cross_entropy(head(states), targets, reduction="none") for states, targets in parts]))
    return torch.stack(rows)


def ratio(ours: torch.Tensor, base: torch.Tensor) -> str:
    difference = (ours - base).flatten()
    stretches = difference[: len(difference) // STRETCH * STRETCH].view(-1, STRETCH).mean(1)
    error = stretches.std() / len(stretches) ** 0.5
    return f"{difference.mean().exp():.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
