"""Perplexity at given lengths and by position, and the divergence from the base model, on the same tokens.

Text is cut into windows of `length` tokens, each predicted from its own start. Sums are kept per window, so that the
standard error is over windows (tokens of one window are not independent). Perplexity is per token; per word (split at white
space) and per byte it does not depend on the tokenizer.

Where models take turns in memory, the base's final hidden states and output embeddings wait on disk in the precision they
were computed in, so that nothing is lost: 2 or 4 bytes times the hidden size for every token.

Shapes: T tokens, D hidden size, C vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.checkpoint.writing import check_space
from linearize.evaluation.lab import MODES, Lab, final_hidden
from linearize.modeling.readout import Readout, readout_of
from linearize.report.results import ALL, BASE, WINDOW_OFF, Findings, make_metric

CHUNK_TOKENS = 256


@dataclass
class WindowScores:
    """Per-window sums of one model: losses [windows, length - 1] and, beside the base, KL and agreement per window."""

    losses: list[Tensor] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)


def measure_perplexity(lab: Lab, length: int, max_tokens: int, *, window_off: bool) -> Findings:
    """Of every model, in all its units, with KL and top-1 agreement with the base."""
    names = lab.at_hand([*ALL, *[WINDOW_OFF] * window_off])
    scores = {name: WindowScores() for name in names}
    windows = windows_of(lab.text, length, max_tokens)
    kept = None if lab.together else BaseOutputs(lab.work / f"base-{length}")

    def score(models: dict[str, PreTrainedModel]) -> None:
        for i, window in enumerate(windows):
            ids = window.to(lab.device)
            outputs = {}
            for name, model in models.items():
                with MODES[name][1](model):
                    outputs[name] = (final_hidden(name, model, ids[None])[0], readout_of(model))
            if kept is not None and BASE in outputs:
                kept.keep(i, len(windows), *outputs[BASE])
            base = outputs[BASE] if BASE in outputs else kept.of_window(i, lab.device)
            score_window(ids, base, outputs, scores)
            lab.tick(f"perplexity@{length}", i + 1, len(windows))

    try:
        lab.in_turn(names, score)
    finally:
        if kept is not None:
            kept.clear()
    return Findings(
        metrics=_metrics(lab, length, windows, scores), positions={f"perplexity@{length}": _by_position(length, scores)}
    )


def _metrics(lab: Lab, length: int, windows: Tensor, scores: dict[str, WindowScores]) -> tuple:
    texts = [lab.tokenizer.decode(window[1:], skip_special_tokens=True) for window in windows]
    nats = {name: [x.sum().item() for x in score.losses] for name, score in scores.items()}
    # over the mean of all windows, so that the mean of the figures is the sum of nats by the sum of units
    words = max(1, sum(len(text.split()) for text in texts)) / len(texts)
    size = max(1, sum(len(text.encode()) for text in texts)) / len(texts)

    def per(unit: float) -> dict[str, list[float]]:
        return {name: [value / unit for value in values] for name, values in nats.items()}

    others = {name: score for name, score in scores.items() if name != BASE}
    return (
        make_metric(f"perplexity@{length}", "lower", per(length - 1), exponentiate=True),
        make_metric(f"word_perplexity@{length}", "lower", per(words), exponentiate=True),
        make_metric(f"byte_perplexity@{length}", "lower", per(size), exponentiate=True),
        make_metric(f"bits_per_byte@{length}", "lower", per(size * math.log(2))),
        make_metric(f"kl@{length}", "lower", {name: score.kl for name, score in others.items()}),
        make_metric(f"agreement@{length}", "higher", {name: score.agreement for name, score in others.items()}),
    )


def _by_position(length: int, scores: dict[str, WindowScores]) -> list[dict[str, float]]:
    stacked = {name: torch.stack(score.losses) for name, score in scores.items()}
    rows = []
    for start, end in position_buckets(length):
        # position p is the p-th token after the first
        means = {name: values[:, start - 1 : end - 1].mean().exp().item() for name, values in stacked.items()}
        rows.append({"start": start, "end": end, **means})
    return rows


class BaseOutputs:
    """The base's final hidden states of every window, and its output embeddings, in files."""

    def __init__(self, path: Path):
        self.paths = {part: path.with_name(f"{path.name}-{part}.bin") for part in ("hidden", "head")}
        self.hidden = self.head = None

    def keep(self, number: int, windows: int, hidden: Tensor, head: Readout) -> None:
        if self.hidden is None:
            self.paths["hidden"].parent.mkdir(parents=True, exist_ok=True)
            check_space(self.paths["hidden"].parent, windows * hidden.nbytes + head.weight.nbytes)
            self.hidden = _file_tensor(self.paths["hidden"], (windows, *hidden.shape), hidden.dtype)
            weight = _file_tensor(self.paths["head"], tuple(head.weight.shape), head.weight.dtype).copy_(head.weight)
            self.head = replace(head, weight=weight, bias=None if head.bias is None else head.bias.clone())
        self.hidden[number].copy_(hidden)

    def of_window(self, number: int, device: str) -> tuple[Tensor, Readout]:
        if self.head.weight.device.type != device:
            self.head = replace(self.head, weight=self.head.weight.to(device))
        return self.hidden[number].to(device), self.head

    def clear(self) -> None:
        self.hidden = self.head = None
        for path in self.paths.values():
            path.unlink(missing_ok=True)


def _file_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def windows_of(token_ids: Tensor, length: int, max_tokens: int) -> Tensor:
    """[windows, length] consecutive windows, at most max_tokens tokens in all and at least one window."""
    count = min(token_ids.numel() // length, max(1, max_tokens // length))
    return token_ids[: count * length].view(count, length)


def score_window(
    ids: Tensor,
    base: tuple[Tensor, Readout],
    outputs: dict[str, tuple[Tensor, Readout]],
    scores: dict[str, WindowScores],
) -> None:
    """Adds one window's figures of every model in `outputs`, beside the base's.

    Args:
        ids: [T].
        base, outputs: final hidden states [T, D] and readout.
    """
    targets = ids[1:]
    losses: dict[str, list[Tensor]] = {name: [] for name in outputs}
    kl, same = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0)
    for start in range(0, targets.numel(), CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, targets.numel()))
        base_log = _log_probs(*base, rows)
        base_probs, base_best = base_log.exp(), base_log.argmax(-1)
        negative_entropy = torch.linalg.vecdot(base_probs, base_log)
        for name, output in outputs.items():
            log = base_log if name == BASE else _log_probs(*output, rows)
            losses[name].append(-log.gather(-1, targets[rows, None])[:, 0])
            if name != BASE:
                same[name] += (base_best == log.argmax(-1)).sum().item()
                kl[name] += (negative_entropy - torch.linalg.vecdot(base_probs, log)).sum().item()
    for name, pieces in losses.items():
        scores[name].losses.append(torch.cat(pieces).double().cpu())
        if name != BASE:
            scores[name].kl.append(kl[name] / targets.numel())
            scores[name].agreement.append(same[name] / targets.numel())


def _log_probs(hidden: Tensor, head: Readout, rows: slice) -> Tensor:
    return F.log_softmax(head(hidden[rows]), dim=-1)


def position_buckets(length: int) -> Iterator[tuple[int, int]]:
    """Position ranges [start, end) that double towards the end: the first 64, then 64 to 128, and so on."""
    start, end = 1, 64
    while start < length:
        yield start, min(end, length)
        start, end = end, end * 2
