"""Measure what a conversion loses, on rows that its heads were not chosen on.

Three models read the same rows: the base, window + sinks alone, and the conversion. Two figures say how it did:

    look-ups     copies, facts and quotes from two distances beyond the window: the share of tokens that are predicted
                 exactly, beside the base's; and in nats, the share of the base's advantage over window + sinks
    divergence   KL from the base on running text beyond the window, in nats a token

Look-ups that the base does not answer do not count.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.checkpoint.source import Source
from linearize.checkpoint.student import read_tokenizer
from linearize.conversion.look_ups import HELD_OUT, TEXT_BEFORE, Answer, LookUpRow, copy_row, text_row
from linearize.conversion.probes import look_up_distances_of
from linearize.data.text_rows import text_tokens
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.readout import Readout
from linearize.settings.config import ConversionConfig
from linearize.training.losses import chunk_for, chunked_kl

# far from any seed that scoring or an evaluation is likely to use
SEED = 777_003
# tokens at the start of the dataset that calibration and scoring may have read
SKIPPED_TEXT = 40_000
# nats a token that a look-up costs more without keys beyond the window, if the base answers it
ANSWERED = 0.5


@dataclass(frozen=True)
class HeldOutRows:
    """Rows to measure on; `texts` are the indices of those with running text."""

    rows: tuple[LookUpRow, ...]
    texts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class Reading:
    """The answers of a model on the held-out rows.

    Attributes:
        hits: kind@distance -> 1 for every token that it predicted exactly, 0 for the others; [tokens].
        nats: kind@distance -> cross-entropy of these tokens in nats, [tokens].
        divergence: KL from the base beyond the window, in nats a token; None without running text.
    """

    hits: dict[str, Tensor]
    nats: dict[str, Tensor]
    divergence: float | None

    def to_stored(self) -> dict[str, Any]:
        """Return everything as JSON; `from_stored` reads it."""
        hits, nats = ({name: x.tolist() for name, x in of.items()} for of in (self.hits, self.nats))
        return {"hits": hits, "nats": nats, "divergence": self.divergence}

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> "Reading":
        """Read what `to_stored` returned."""
        hits, nats = ({name: torch.tensor(x) for name, x in stored[kind].items()} for kind in ("hits", "nats"))
        return cls(hits, nats, stored["divergence"])

    def to_dict(self) -> dict[str, Any]:
        """Return the record for linearize.json: means."""
        return {
            "hits": {name: round(hits.mean().item(), 4) for name, hits in self.hits.items()},
            "nats": {name: round(nats.mean().item(), 4) for name, nats in self.nats.items()},
            "divergence": None if self.divergence is None else round(self.divergence, 5),
        }


def held_out_rows(source: Source, config: dict[str, Any], settings: ConversionConfig) -> HeldOutRows:
    """Build rows of copies, and rows of text with facts and quotes if there is a tokenizer.

    Args:
        config: the base's config, with every default filled in.
    """
    quality, generator = settings.quality, torch.Generator().manual_seed(SEED)
    positions = config["max_position_embeddings"]
    distances = look_up_distances_of(settings, positions)
    if (tokenizer := read_tokenizer(source.folder)) is None:
        return HeldOutRows(_random_rows(config, distances, quality.rows, generator), ())

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    # without look-ups, a row that leaves the window is enough for the divergence
    length = max(distances) + TEXT_BEFORE if distances else min(4 * settings.window, positions)
    needed = quality.rows * length
    text = text_tokens(tokenizer, settings.scoring.text, SKIPPED_TEXT + needed)[-needed:]
    parts = [text[number * length : (number + 1) * length] for number in range(quality.rows)]
    rows = [
        text_row(encode, part, distances, settings.window, config["vocab_size"], generator, HELD_OUT)
        if distances
        else _plain_row(part, settings.window)
        for part in parts
    ]
    complete = tuple(row for row in rows if row is not None)
    if complete:
        return HeldOutRows(complete, tuple(range(len(complete))))
    return HeldOutRows(_random_rows(config, distances, quality.rows, generator), ())


def _plain_row(text: Sequence[int], window: int) -> LookUpRow | None:
    """Build a row of running text alone; None if it does not leave the window."""
    return LookUpRow(torch.tensor(text), (), len(text)) if len(text) > window else None


def _random_rows(
    config: dict[str, Any], distances: Sequence[int], rows: int, generator: torch.Generator
) -> tuple[LookUpRow, ...]:
    """Build rows of random tokens, for a model without a tokenizer or a text that is too short."""
    start_token = config.get("bos_token_id")
    return tuple(
        copy_row(distances, config["vocab_size"], start_token, generator) for _ in range(rows if distances else 0)
    )


@torch.no_grad()
def read_rows(
    stream: LayerStream, held_out: HeldOutRows, window: int, base_hidden: Sequence[Tensor] | None = None
) -> tuple[Reading, list[Tensor]]:
    """Let a model read the rows.

    Args:
        window: tokens at the start of a text that do not count for the divergence.
        base_hidden: the base's hidden states on the rows with text; None for the base itself.

    Returns:
        The reading, and the model's own hidden states [T, D] behind the final norm on the rows with text.
    """
    kept = stream.kept_pass("rows")
    hidden = stream.last_hidden([row.ids for row in held_out.rows], kept)
    kept.remove()
    hits, nats, divergences = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list), []
    with stream.readout() as head:
        for row, states in zip(held_out.rows, hidden, strict=True):
            for answer in row.answers:
                name = f"{answer.kind}@{answer.distance}"
                right, loss = _answered(states, head, row.ids, answer)
                hits[name].append(right)
                nats[name].append(loss)
        for place, number in enumerate(held_out.texts):
            counted = slice(window, held_out.rows[number].asked)
            if base_hidden is not None and (states := hidden[number][counted]).shape[0]:
                weights = torch.full((len(states),), 1 / len(states), device=states.device)
                kl = chunked_kl(states, base_hidden[place][counted], head, head, weights, chunk_for(head))
                divergences.append(kl.item())
    reading = Reading(
        {name: torch.cat(of_name).cpu() for name, of_name in hits.items()},
        {name: torch.cat(of_name).cpu() for name, of_name in nats.items()},
        sum(divergences) / len(divergences) if divergences else None,
    )
    return reading, [hidden[number] for number in held_out.texts]


def _answered(hidden: Tensor, head: Readout, ids: Tensor, answer: Answer) -> tuple[Tensor, Tensor]:
    """Return for each token of an answer 1 if it is predicted exactly, else 0, and its cross-entropy."""
    logits = head(hidden[answer.start - 1 : answer.stop - 1]).float()
    wanted = ids[answer.start : answer.stop].to(logits.device)
    return (logits.argmax(-1) == wanted).float(), F.cross_entropy(logits, wanted, reduction="none")


class Held(NamedTuple):
    """A share of what the base can do that a model holds, and its standard error."""

    share: float
    error: float


@dataclass(frozen=True)
class Standard:
    """The readings that a conversion is measured against.

    A few hundred tokens say a share to one or two percent. All look-ups from one distance together may be below the
    target by their standard error, those of one kind alone by twice that.

    Attributes:
        base, window_alone: readings of the base, and of window + sinks in every head.
        quality: share of the base's look-ups that has to be held.
        divergence: largest KL from the base on text beyond the window.
    """

    base: Reading
    window_alone: Reading
    quality: float
    divergence: float

    @property
    def answered(self) -> tuple[str, ...]:
        """Return the names of the look-ups that the base answers from beyond the window."""
        gains = {name: (self.window_alone.nats[name] - nats).mean() for name, nats in self.base.nats.items()}
        return tuple(name for name, gain in gains.items() if gain > ANSWERED)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the look-ups that are judged together, by name: all from one distance, and each kind alone."""
        by_distance = defaultdict[str, tuple[str, ...]](tuple)
        for name in self.answered:
            by_distance[f"look-ups@{name.partition('@')[2]}"] += (name,)
        return by_distance | {name: (name,) for name in self.answered}

    def held(self, reading: Reading) -> dict[str, dict[str, Held]]:
        """Return for every group of look-ups the shares of the base's hits and of its advantage in nats."""
        shares = {}
        for group, names in self.groups().items():
            base, alone, model = (
                {kind: torch.cat([getattr(of, kind)[name] for name in names]) for kind in ("hits", "nats")}
                for of in (self.base, self.window_alone, reading)
            )
            shares[group] = {
                "hits": _share(model["hits"], base["hits"], self.quality),
                "nats": _share(alone["nats"] - model["nats"], alone["nats"] - base["nats"], self.quality),
            }
        return shares

    def lost(self, reading: Reading) -> dict[str, dict[str, Held]]:
        """Return those groups of `held` that miss the target by more than chance."""
        return {
            group: shares
            for group, shares in self.held(reading).items()
            if any(
                # written so that NaN is lost, too
                not held.share + (1 if group.startswith("look-ups") else 2) * held.error >= self.quality
                for held in shares.values()
            )
        }

    def holds_text(self, reading: Reading) -> bool:
        """Return True if a model is near enough to the base on running text."""
        return reading.divergence is None or reading.divergence <= self.divergence

    def holds(self, reading: Reading) -> bool:
        """Return True if a model holds all that is asked for."""
        return not self.lost(reading) and self.holds_text(reading)

    def shortfalls(self, reading: Reading) -> list[str]:
        """Say in words what a model loses: one phrase for each figure that is not held."""
        phrases = [
            f"{group.replace('@', ' from ')} tokens back: {shares['hits'].share:.0%} of the base's hits, "
            f"{shares['nats'].share:.0%} of its advantage in nats"
            for group, shares in self.lost(reading).items()
        ]
        if not self.holds_text(reading):
            phrases.append(f"text beyond the window: KL from the base {reading.divergence:.4f}")
        return phrases


def _share(model: Tensor, base: Tensor, target: float) -> Held:
    """Return the sum of `model` as a share of the sum of `base`, both [tokens], and the error of the target's test."""
    total = base.sum().item()
    if total <= 0:
        return Held(1.0, 0.0)
    spread = (model - target * base).std().item() if len(base) > 1 else 0.0
    return Held(model.sum().item() / total, spread * math.sqrt(len(base)) / total)
