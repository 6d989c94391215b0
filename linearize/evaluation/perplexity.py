"""Perplexity at given lengths and by position, and the divergence from the base model, on the same tokens.

Text is cut into windows of `length` tokens, each predicted from its own start. Sums are kept per window, so that the
standard error is over windows (tokens of one window are not independent).

Shapes: B windows, T tokens, D hidden size, C vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.modeling.readout import Readout

CHUNK_TOKENS = 256


@dataclass
class WindowScores:
    """Per-window sums of one model: losses [windows, length - 1] and, beside the base, KL and agreement per window."""

    losses: list[Tensor] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)


def windows_of(token_ids: Tensor, length: int, max_tokens: int) -> Tensor:
    """[windows, length] consecutive windows, at most max_tokens tokens in all and at least one window."""
    count = min(token_ids.numel() // length, max(1, max_tokens // length))
    return token_ids[: count * length].view(count, length)


def score_window(
    ids: Tensor,
    base: Callable[[Tensor], tuple[Tensor, Readout]],
    others: dict[str, Callable[[Tensor], tuple[Tensor, Readout]]],
    scores: dict[str, WindowScores],
) -> None:
    """Adds one window's figures for the base and every other model.

    Args:
        ids: [1, T].
        base, others: functions from ids to (final hidden states [T, D], readout).
    """
    targets = ids[0, 1:]
    base_hidden, base_head = base(ids)
    outputs = {name: forward(ids) for name, forward in others.items()}
    losses: dict[str, list[Tensor]] = {name: [] for name in scores}
    kl, same = dict.fromkeys(others, 0.0), dict.fromkeys(others, 0)
    for start in range(0, targets.numel(), CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, targets.numel()))
        base_log = F.log_softmax(base_head(base_hidden[rows]), dim=-1)
        base_probs, base_best = base_log.exp(), base_log.argmax(-1)
        losses["base"].append(-base_log.gather(-1, targets[rows, None])[:, 0])
        for name, (hidden, head) in outputs.items():
            log = F.log_softmax(head(hidden[rows]), dim=-1)
            losses[name].append(-log.gather(-1, targets[rows, None])[:, 0])
            same[name] += (base_best == log.argmax(-1)).sum().item()
            kl[name] += (base_probs * (base_log - log)).sum().item()
    for name, pieces in losses.items():
        scores[name].losses.append(torch.cat(pieces).double().cpu())
    for name in others:
        scores[name].kl.append(kl[name] / targets.numel())
        scores[name].agreement.append(same[name] / targets.numel())


def position_buckets(length: int) -> Iterator[tuple[int, int]]:
    """Position ranges [start, end) that double towards the end: the first 64, then 64 to 128, and so on."""
    start, end = 1, 64
    while start < length:
        yield start, min(end, length)
        start, end = end, end * 2
