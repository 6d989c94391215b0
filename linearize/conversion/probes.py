"""Build the rows that head scores are measured on: copies, made-up facts in text, and long text.

Shapes: T tokens, Q positions that are asked about, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.data.recall_rows import SPAN, recall_task
from linearize.errors import ConfigError
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.readout import Readout
from linearize.training.losses import chunked_kl

# far from any seed that an evaluation is likely to use, so that scores and evaluation see different rows
SEED = 777_001
# values of all gates at which the gradient method takes the slope; a divergence from the base has no slope at 1
RECALL_GATES, TEXT_GATES = (1.0, 0.5), (0.75, 0.25)
# tokens whose logits over the vocabulary are in memory at once
CHUNK_TOKENS = 256

FACT = " To open the {thing} of {owner}, enter {number}.\n"
QUESTION = "\nTo open the {thing} of {owner}, enter"
THINGS = ("locker", "suitcase", "safe", "garden gate", "bicycle lock", "archive", "workshop", "cellar")
OWNERS = ("Miriam", "Oscar", "Helena", "Tobias", "Ingrid", "Marcus", "Beatrice", "Conrad")
# tokens of text before the farthest fact, so that the fact is not among the sinks
TEXT_BEFORE_FACTS = 64
# facts drawn for each row that is needed: most answers have the commonest length in tokens, and only those of the first
# fact's length are used
FACTS_PER_ROW = 64


@dataclass(frozen=True)
class Probe:
    """Rows of tokens whose loss shows what a head is good for.

    Attributes:
        name: words for progress messages.
        ids: token ids [rows, T].
        loss: computes the loss on one row from its hidden states [T, D] behind the final norm, the readout, and the
            row's number.
        gates: values of all gates at which the gradient method takes the slope.
        queries: positions [Q] whose attention the look-up method measures.
        far: keys that count for each of them, [Q, T] bool.
    """

    name: str
    ids: Tensor
    loss: Callable[[Tensor, Readout, int], Tensor]
    gates: tuple[float, ...]
    queries: Tensor
    far: Tensor

    @torch.no_grad()
    def losses(self, stream: LayerStream) -> list[float]:
        """Return the loss on every row."""
        hidden = stream.last_hidden(list(self.ids))
        with stream.readout() as head:
            return [self.loss(states, head, row).item() for row, states in enumerate(hidden)]

    def mean_loss(self, stream: LayerStream) -> float:
        """Return the mean of the rows' losses."""
        losses = self.losses(stream)
        return sum(losses) / len(losses)


def recall_probe(distance: int, rows: int, vocabulary: int, start_token: int | None) -> Probe:
    """Build rows of random tokens in which a span comes again after `distance` tokens."""
    task = recall_task(distance, rows, vocabulary, start_token, SEED)
    T = task.ids.shape[1]
    queries = torch.arange(T - task.counted - 1, T - 1)
    # the key to look up is the token that followed the current one last time
    far = torch.arange(T) == (queries + 1 - distance)[:, None]

    def loss(hidden: Tensor, head: Readout, row: int) -> Tensor:
        return loss_of_last(hidden, head, task.ids[row], task.counted)

    return Probe(f"recall at distance {distance}", task.ids, loss, RECALL_GATES, queries, far)


def recall_probes(
    distances: Sequence[int], rows: int, *, window: int, positions: int, vocabulary: int, start_token: int | None
) -> list[Probe]:
    """Build a recall probe for every distance outside the window.

    Raises:
        ConfigError: no distance is outside the window and fits the model's positions.
    """
    fitting = fitting_distances(tuple(distances), window, positions)
    if not fitting:
        raise ConfigError(
            f"keep_softmax: no recall can be scored: of distances {', '.join(map(str, distances))} none is outside the "
            f"window of {window} and inside the model's {positions} positions"
        )
    return [recall_probe(distance, rows, vocabulary, start_token) for distance in fitting]


def fitting_distances(distances: tuple[int, ...], window: int, positions: int) -> list[int]:
    """Return the distances that are outside the window and whose rows fit the model's positions."""
    return [distance for distance in distances if distance > window and distance + SPAN + 1 <= positions]


@dataclass(frozen=True)
class _Fact:
    """A made-up fact as token ids: its statement, the question for it, and the answer."""

    statement: list[int]
    question: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.statement) + len(self.question) + len(self.answer)


def _draw_fact(encode: Callable[[str], list[int]], generator: torch.Generator) -> _Fact:
    """Make up a fact: the number that opens somebody's thing.

    The generator draws thing, owner and number, in this order, so that a seed always makes the same facts.
    """

    def pick(options: Sequence[Any]) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    about = {"thing": pick(THINGS), "owner": pick(OWNERS)}
    number = str(10_000 + pick(range(90_000)))  # five digits
    statement = encode(FACT.format(**about, number=number))
    question = encode(QUESTION.format(**about))
    # encoded as one text, since a tokenizer may split the answer alone differently
    question_and_answer = encode(QUESTION.format(**about) + f" {number}")
    return _Fact(statement, question, answer=question_and_answer[len(question) :])


def facts_probe(
    encode: Callable[[str], list[int]], text: Sequence[int], window: int, distance: int, rows: int
) -> Probe:
    """Build rows of text that state a made-up fact and ask for it beyond the window.

    The rows ask at different distances, evenly spread above `window` and up to `distance`.

    Args:
        encode: turns text into token ids, without special tokens.
        text: token ids that fill the rows, at least `distance` + 2 TEXT_BEFORE_FACTS of them.
        distance: longest distance in tokens from a fact to its answer.
    """
    generator = torch.Generator().manual_seed(SEED + distance)
    facts = [_draw_fact(encode, generator) for _ in range(FACTS_PER_ROW * rows)]
    # answers of one length in tokens, so that all rows ask about the same positions
    answer_length = len(facts[0].answer)
    facts = [fact for fact in facts if len(fact.answer) == answer_length][:rows]
    length = distance + 2 * TEXT_BEFORE_FACTS
    filled, far = [], torch.zeros(length, dtype=torch.bool)
    for row, fact in enumerate(facts):
        row_distance = window + (row + 1) * (distance - window) // rows
        after = max(0, row_distance - len(fact.question))
        before = length - after - len(fact)
        start = row * length % max(1, len(text) - length)
        filler = list(text[start : start + before + after])
        filled.append([*filler[:before], *fact.statement, *filler[before:], *fact.question, *fact.answer])
        far[before : before + len(fact.statement)] = True
    ids = torch.tensor(filled)

    def loss(hidden: Tensor, head: Readout, row: int) -> Tensor:
        return loss_of_last(hidden, head, ids[row], answer_length)

    queries = torch.arange(length - answer_length - 1, length - 1)
    return Probe(f"facts at distance {distance}", ids, loss, RECALL_GATES, queries, far.expand(answer_length, -1))


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
        return chunked_kl(beyond, base_hidden[row], head, head, weights, CHUNK_TOKENS)

    T = ids.shape[1]
    queries, keys = torch.arange(window, T), torch.arange(T)
    far = (queries[:, None] - keys >= window) & (keys >= sinks)
    return Probe("text", ids, loss, TEXT_GATES, queries, far)


def loss_of_last(hidden: Tensor, head: Readout, row: Tensor, counted: int) -> Tensor:
    """Return the cross-entropy of the last `counted` tokens of a row [T] with hidden states [T, D]."""
    logits = head(hidden[-counted - 1 : -1])
    return F.cross_entropy(logits, row[-counted:].to(logits.device))
