"""Build the probes that head scores are measured with: copies, made-up facts in text, and long text.

Shapes: T tokens, Q positions that are asked about, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.conversion.look_ups import SCORING, LookUpRow, copy_row, look_up_distances, text_row
from linearize.errors import ConfigError
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.readout import Readout
from linearize.settings.config import ConversionConfig
from linearize.training.losses import chunk_for, chunked_cross_entropy, chunked_kl

# far from any seed that an evaluation is likely to use, so that scores and evaluation see different rows
SEED = 777_001
# values of all gates at which the gradient method takes the slope; a divergence from the base has no slope at 1
RECALL_GATES, TEXT_GATES = (0.5,), (0.75, 0.25)


@dataclass(frozen=True)
class Probe:
    """Rows of tokens whose loss shows what a head is good for.

    Attributes:
        name: words for progress messages.
        rows: token ids [T] of every row.
        loss: computes the loss on one row from its hidden states [T, D] behind the final norm, the readout, and the
            row's number.
        gates: values of all gates at which the gradient method takes the slope.
        queries: for every row the positions [Q] whose attention the look-up method measures.
        far: for every row the keys that count for each of them, [Q, T] bool.
    """

    name: str
    rows: tuple[Tensor, ...]
    loss: Callable[[Tensor, Readout, int], Tensor]
    gates: tuple[float, ...]
    queries: tuple[Tensor, ...]
    far: tuple[Tensor, ...]

    @torch.no_grad()
    def losses(self, stream: LayerStream) -> list[float]:
        """Return the loss on every row."""
        hidden = stream.last_hidden(self.rows)
        with stream.readout() as head:
            return [self.loss(states, head, row).item() for row, states in enumerate(hidden)]

    def mean_loss(self, stream: LayerStream) -> float:
        """Return the mean of the rows' losses."""
        losses = self.losses(stream)
        return sum(losses) / len(losses)


def look_up_probe(name: str, rows: Sequence[LookUpRow]) -> Probe:
    """Make a probe of rows that ask about what stands far back: its loss is the answers' mean cross-entropy."""
    positions = [torch.cat([torch.arange(a.start, a.stop) for a in row.answers]) for row in rows]

    def loss(hidden: Tensor, head: Readout, row: int) -> Tensor:
        counted = positions[row]
        targets = rows[row].ids[counted].to(hidden.device)
        weights = torch.full((len(counted),), 1 / len(counted), device=hidden.device)
        return chunked_cross_entropy(hidden[counted.to(hidden.device) - 1], head, targets, weights, chunk_for(head))

    return Probe(
        name,
        rows=tuple(row.ids for row in rows),
        loss=loss,
        gates=RECALL_GATES,
        queries=tuple(of_row - 1 for of_row in positions),
        far=tuple(torch.cat([answer.keys(len(row.ids)) for answer in row.answers]) for row in rows),
    )


def copies_probe(distances: Sequence[int], rows: int, vocabulary: int, start_token: int | None) -> Probe:
    """Build rows of random tokens in which a span comes again after each of the distances."""
    generator = torch.Generator().manual_seed(SEED)
    built = [copy_row(distances, vocabulary, start_token, generator) for _ in range(rows)]
    return look_up_probe(f"copies from {_listed(distances)} tokens back", built)


def text_look_ups_probe(
    encode: Callable[[str], list[int]],
    text: Sequence[int],
    window: int,
    distances: Sequence[int],
    rows: int,
    vocabulary: int,
) -> Probe | None:
    """Build rows of text that ask for facts, passages and random tokens from each of the distances.

    Args:
        encode: turns text into token ids, without special tokens.
        text: token ids that fill the rows, each row with its own part.

    Returns:
        None if the text is too short.
    """
    generator = torch.Generator().manual_seed(SEED)
    part = len(text) // rows
    parts = [text[row * part : (row + 1) * part] for row in range(rows)]
    built = [text_row(encode, of_row, distances, window, vocabulary, generator, SCORING) for of_row in parts]
    complete = [row for row in built if row is not None]
    return look_up_probe(f"look-ups from {_listed(distances)} tokens back", complete) if complete else None


def _listed(distances: Sequence[int]) -> str:
    return " and ".join(map(str, sorted(distances)))


def fitting_distances(distances: Sequence[int] | None, window: int, positions: int) -> tuple[int, ...]:
    """Return the distances to score at.

    Args:
        distances: the user's choice, of which those stay that are outside the window and leave half the positions
            for the rest of a row; None: 2.5 and 6 windows.
    """
    if distances is None:
        return look_up_distances(window, positions)
    return tuple(distance for distance in sorted(distances) if distance > window and 2 * distance <= positions)


def look_up_distances_of(settings: ConversionConfig, positions: int) -> tuple[int, ...]:
    """Return the distances to score and to measure at, within the window of the softmax heads if they have one."""
    reach = min(positions, settings.softmax_window or positions)
    return fitting_distances(settings.scoring.distances, settings.window, reach)


def require_distances(distances: Sequence[int] | None, window: int, positions: int) -> tuple[int, ...]:
    """Return the distances to score at; see `fitting_distances`.

    Raises:
        ConfigError: there is none.
    """
    if fitting := fitting_distances(distances, window, positions):
        return fitting
    chosen = "" if distances is None else f" of distances {', '.join(map(str, distances))}"
    raise ConfigError(
        f"keep_softmax: no recall can be scored:{chosen} none is outside the window of {window} and well inside the "
        f"model's {positions} positions; use a smaller --window"
    )


@torch.no_grad()
def text_probe(stream: LayerStream, ids: Tensor, window: int, sinks: int) -> Probe:
    """Make a probe of text [rows, T]: its loss is the divergence of the gated model from the base beyond the window.

    Args:
        stream: the base model, without gates.
    """
    base_hidden = [hidden[window:] for hidden in stream.last_hidden(list(ids))]

    def loss(hidden: Tensor, head: Readout, row: int) -> Tensor:
        beyond = hidden[window:]
        weights = torch.full((len(beyond),), 1 / len(beyond), device=beyond.device)
        return chunked_kl(beyond, base_hidden[row], head, head, weights, chunk_for(head))

    rows, T = ids.shape
    queries, keys = torch.arange(window, T), torch.arange(T)
    far = (queries[:, None] - keys >= window) & (keys >= sinks)
    return Probe("text", tuple(ids), loss, TEXT_GATES, (queries,) * rows, (far,) * rows)
