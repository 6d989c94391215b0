"""Score windows of text: losses of every model, and its divergence from and agreement with the base.

Shapes: T tokens, D hidden size, C vocabulary.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.checkpoint.work_folder import claim
from linearize.checkpoint.writing import check_space
from linearize.modeling.readout import Readout
from linearize.report.results import BASE

# rows of logits at a time; bounds the memory of [CHUNK_TOKENS, C]
CHUNK_TOKENS = 256


@dataclass
class WindowScores:
    """Scores of one model, window by window.

    Attributes:
        losses: cross-entropy of every token after the first, [T - 1] a window, in nats.
        kl: mean KL divergence of the model from the base, in nats a token.
        agreement: share of tokens where model and base have the same most likely token.
    """

    losses: list[Tensor] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)


class BaseOutputs:
    """The base's final hidden states of every window and its readout.

    Where models take turns in memory they wait in files until the last model has been scored. The files have the
    precision that the base computed in, so that nothing is lost: 2 or 4 bytes times the hidden size for every token.
    """

    def __init__(self, path: Path, windows: int, *, on_disk: bool) -> None:
        self.paths = {part: path.with_name(f"{path.name}-{part}.bin") for part in ("hidden", "head")}
        self.windows = windows
        self.on_disk = on_disk
        # of all windows on disk, [windows, T, D]; of the newest in memory
        self._hidden: Tensor | None = None
        self._readout: Readout | None = None

    def store(self, number: int, hidden: Tensor, readout: Readout) -> None:
        """Store the hidden states [T, D] of one window. The readout is stored once."""
        if not self.on_disk:
            self._hidden, self._readout = hidden, readout
            return
        if self._hidden is None:
            self._hidden, self._readout = self._create_files(hidden, readout)
        self._hidden[number].copy_(hidden)

    def load(self, number: int, device: str) -> tuple[Tensor, Readout]:
        """Return the hidden states [T, D] of one window and the readout."""
        assert self._hidden is not None and self._readout is not None, "the base is scored first"
        if not self.on_disk:
            return self._hidden, self._readout
        if self._readout.weight.device.type != device:
            self._readout = replace(self._readout, weight=self._readout.weight.to(device))
        return self._hidden[number].to(device), self._readout

    def clear(self) -> None:
        """Delete the files."""
        self._hidden = self._readout = None
        for path in self.paths.values():
            path.unlink(missing_ok=True)

    def _create_files(self, hidden: Tensor, readout: Readout) -> tuple[Tensor, Readout]:
        folder = self.paths["hidden"].parent
        claim(folder)
        check_space(folder, self.windows * hidden.nbytes + readout.weight.nbytes)
        states = _file_tensor(self.paths["hidden"], (self.windows, *hidden.shape), hidden.dtype)
        weight = _file_tensor(self.paths["head"], tuple(readout.weight.shape), readout.weight.dtype)
        weight.copy_(readout.weight)
        return states, replace(readout, weight=weight, bias=None if readout.bias is None else readout.bias.clone())


def _file_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def windows_of(token_ids: Tensor, length: int, max_tokens: int) -> Tensor:
    """Cut ids [N] into consecutive windows [windows, length]: at most `max_tokens` in all, one window at least."""
    count = min(token_ids.numel() // length, max(1, max_tokens // length))
    return token_ids[: count * length].view(count, length)


def score_window(
    ids: Tensor,
    base: tuple[Tensor, Readout],
    outputs: dict[str, tuple[Tensor, Readout]],
    scores: dict[str, WindowScores],
) -> None:
    """Append the scores of one window to those of every model in `outputs`.

    Args:
        ids: [T].
        base, outputs: final hidden states [T, D] and readout.
    """
    targets = ids[1:]
    losses: dict[str, list[Tensor]] = {name: [] for name in outputs}
    kl = dict.fromkeys(outputs, 0.0)
    agreeing = dict.fromkeys(outputs, 0)
    for start in range(0, targets.numel(), CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, targets.numel()))
        base_log = _log_probs(*base, rows)
        base_probs, base_best = base_log.exp(), base_log.argmax(-1)
        negative_entropy = torch.linalg.vecdot(base_probs, base_log)
        for name, output in outputs.items():
            log = base_log if name == BASE else _log_probs(*output, rows)
            losses[name].append(-log.gather(-1, targets[rows, None])[:, 0])
            if name != BASE:
                agreeing[name] += int((base_best == log.argmax(-1)).sum())
                kl[name] += (negative_entropy - torch.linalg.vecdot(base_probs, log)).sum().item()
    for name, chunks in losses.items():
        scores[name].losses.append(torch.cat(chunks).double().cpu())
        if name != BASE:
            scores[name].kl.append(kl[name] / targets.numel())
            scores[name].agreement.append(agreeing[name] / targets.numel())


def _log_probs(hidden: Tensor, readout: Readout, rows: slice) -> Tensor:
    return F.log_softmax(readout(hidden[rows]), dim=-1)
