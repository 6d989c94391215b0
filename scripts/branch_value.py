"""What the recurrent branch is worth: students beside their base, themselves with the branch off and one another, token by token.

    python scripts/branch_value.py STUDENT... --text valid.txt --book book.txt [--tokens 131072] [--results FILE]

Perplexity ratios to the base and divergence from it, in nats a token, in windows of 2,048 tokens of the text and 8,192 of the book.
Where a student is not the first, also its perplexity as a ratio to the first's, and its divergence less the first's. Standard errors are
of paired differences over stretches of 256 tokens. Every STUDENT has the same base.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
from pathlib import Path

import torch
from results_file import write_results
from torch.nn import functional as F

from linearize.device import compute_dtype, keep_freed_memory
from linearize.evaluation.perplexity import windows_of
from linearize.modeling.loading import load_student, load_tokenizer
from linearize.modeling.readout import readout_of

STRETCH, CHUNK, CHARACTERS_A_TOKEN = 256, 512, 8
WINDOWS = {"text": 2048, "book": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768, help="of each")
    parser.add_argument("--branch-off", action="store_true", help="also measure every student without its branch")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    keep_freed_memory()
    tokenizer, lines = load_tokenizer(arguments.students[0]), []
    for name, window in WINDOWS.items():
        text = getattr(arguments, name).read_text(encoding="utf-8")[: CHARACTERS_A_TOKEN * arguments.tokens]
        ids = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.tokens]
        lines += compared(arguments.students, windows_of(ids, window, arguments.tokens), name, arguments.branch_off)
    if arguments.results:
        document = {"command": shlex.join(["python", *sys.argv]), "lines": lines}
        write_results(arguments.results, document)


@torch.no_grad()
def compared(students: list[Path], windows: torch.Tensor, text: str, branch_off: bool) -> list[dict]:
    """One line for every student on one text."""
    lines, base, first = [], None, None
    for folder in students:
        model = load_student(folder, dtype=compute_dtype("auto"))
        if base is None:
            with model.softmax_attention():
                base = [hidden(model, window) for window in windows]
        modes = {"branch off": model.recurrent_branch_off} if branch_off else {}
        for mode, inside in {**modes, "student": contextlib.nullcontext}.items():
            with inside():
                found = torch.stack([measured(model, *pair) for pair in zip(windows, base, strict=True)])
            ours, theirs, divergence = found.unbind(-1)
            line = {"student": str(folder), "mode": mode, "text": text, "windows": list(windows.shape)}
            line["perplexity_ratio"] = log_ratio(ours - theirs)
            line["kl"] = mean(divergence)
            if first is not None:
                line["perplexity_beside_first"] = log_ratio(ours - first[0])
                line["kl_less_first"] = mean(divergence - first[1])
            lines.append(line)
            print(json.dumps(line), flush=True)
        first = first or (ours, divergence)
    return lines


def hidden(model, row: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0]


def measured(model, window: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Of every token but the first its loss, the base's, and the divergence between them, [length - 1, 3]."""
    head, parts = readout_of(model), []
    chunks = zip(*(x.split(CHUNK) for x in (hidden(model, window)[:-1], base[:-1], window[1:])), strict=True)
    for ours, theirs, targets in chunks:
        student, reference = (F.log_softmax(head(states).float(), dim=-1) for states in (ours, theirs))
        divergence = (reference.exp() * (reference - student)).sum(-1)
        parts.append(
            torch.stack([*(-x.gather(1, targets[:, None])[:, 0] for x in (student, reference)), divergence], 1)
        )
    return torch.cat(parts)


def mean(values: torch.Tensor) -> dict[str, float]:
    """Over all tokens, with its standard error over stretches."""
    stretches = values.flatten()
    stretches = stretches[: len(stretches) // STRETCH * STRETCH].view(-1, STRETCH).mean(1)
    return {"mean": values.mean().item(), "error": (stretches.std() / len(stretches) ** 0.5).item()}


def log_ratio(difference: torch.Tensor) -> dict[str, float]:
    """A difference of losses as a ratio of perplexities."""
    found = mean(difference)
    return {"mean": math.exp(found["mean"]), "error": found["error"]}


if __name__ == "__main__":
    main()
