"""Measure what the recurrent branch is worth, on students beside their base and beside themselves without it.

    python scripts/branch_value.py STUDENT... --text valid.txt --book book.txt [--tokens 131072] [--results FILE]

Prints perplexity ratios to the base and divergence from it, in nats a token, in windows of 2,048 tokens of the text
and 8,192 of the book. For every student but the first, also prints its perplexity as a ratio to the first's, and the
difference of their divergences. Standard errors are of paired differences over stretches of 256 tokens. Every STUDENT
has the same base.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.device import compute_dtype, keep_freed_memory
from linearize.evaluation.window_scores import windows_of
from linearize.modeling.loading import load_student, load_tokenizer
from linearize.modeling.readout import readout_of

# tokens that count as one observation, since losses of neighbours are correlated
STRETCH = 256
# tokens whose logits are in memory at a time
CHUNK = 512
# more than any tokenizer puts into one token of English, so that enough text is read
CHARACTERS_A_TOKEN = 8
WINDOWS = {"text": 2048, "book": 8192}


def main() -> None:
    """Compare the students on both texts, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+", help="linearized folders")
    parser.add_argument("--text", type=Path, required=True, help="plain text for windows of 2,048 tokens")
    parser.add_argument("--book", type=Path, required=True, help="plain text for windows of 8,192 tokens")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of each text")
    parser.add_argument("--branch-off", action="store_true", help="also measure every student without its branch")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    keep_freed_memory()
    tokenizer, lines = load_tokenizer(arguments.students[0]), []
    for name, window in WINDOWS.items():
        text = getattr(arguments, name).read_text(encoding="utf-8")[: CHARACTERS_A_TOKEN * arguments.tokens]
        ids = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.tokens]
        windows = windows_of(ids, window, arguments.tokens)
        lines += compare_students(arguments.students, windows, name, arguments.branch_off)
    if arguments.results:
        document = {"command": shlex.join(["python", *sys.argv]), "lines": lines}
        arguments.results.write_text(json.dumps(document, indent=1) + "\n")


@torch.no_grad()
def compare_students(students: list[Path], windows: torch.Tensor, text: str, branch_off: bool) -> list[dict[str, Any]]:
    """Measure every student on the windows of one text, [N, T]; return and print one line for each."""
    lines: list[dict[str, Any]] = []
    base_states: list[torch.Tensor] = []
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for folder in students:
        model = load_student(folder, dtype=compute_dtype("auto"))
        if not base_states:
            with model.softmax_attention():
                base_states = [hidden_states(model, window) for window in windows]
        modes = {"branch off": model.recurrent_branch_off} if branch_off else {}
        for mode, context in {**modes, "student": contextlib.nullcontext}.items():
            with context():
                pairs = zip(windows, base_states, strict=True)
                losses = torch.stack([token_losses(model, window, base) for window, base in pairs])
            student_loss, base_loss, divergence = losses.unbind(-1)
            line = {"student": str(folder), "mode": mode, "text": text, "windows": list(windows.shape)}
            line["perplexity_ratio"] = log_ratio(student_loss - base_loss)
            line["kl"] = mean_and_error(divergence)
            if first is not None:
                line["perplexity_beside_first"] = log_ratio(student_loss - first[0])
                line["kl_less_first"] = mean_and_error(divergence - first[1])
            lines.append(line)
            print(json.dumps(line), flush=True)
        first = first or (student_loss, divergence)
    return lines


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the final hidden states of one window, [T, D]."""
    return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def token_losses(model: PreTrainedModel, window: torch.Tensor, base_states: torch.Tensor) -> torch.Tensor:
    """Return, for every token but the first, the student's loss, the base's, and the divergence: [T - 1, 3]."""
    head, parts = readout_of(model), []
    inputs = hidden_states(model, window)[:-1], base_states[:-1], window[1:]
    for student, base, targets in zip(*(x.split(CHUNK) for x in inputs), strict=True):
        student_log_p, base_log_p = (F.log_softmax(head(states).float(), dim=-1) for states in (student, base))
        divergence = (base_log_p.exp() * (base_log_p - student_log_p)).sum(-1)
        losses = [-log_p.gather(1, targets[:, None])[:, 0] for log_p in (student_log_p, base_log_p)]
        parts.append(torch.stack([*losses, divergence], 1))
    return torch.cat(parts)


def mean_and_error(values: torch.Tensor) -> dict[str, float]:
    """Return the mean over all tokens and its standard error over stretches."""
    stretches = values.flatten()
    stretches = stretches[: len(stretches) // STRETCH * STRETCH].view(-1, STRETCH).mean(1)
    return {"mean": values.mean().item(), "error": (stretches.std() / len(stretches) ** 0.5).item()}


def log_ratio(difference: torch.Tensor) -> dict[str, float]:
    """Return a difference of losses as a ratio of perplexities; the error is of the logarithm."""
    figures = mean_and_error(difference)
    return {"mean": math.exp(figures["mean"]), "error": figures["error"]}


if __name__ == "__main__":
    main()
