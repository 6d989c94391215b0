"""Build the rows that head scores are measured on: copies, made-up facts in text, and long text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.data.recall_rows import SPAN, recall_task
from linearize.errors import ConfigError
from linearize.modeling.readout import readout_of
from linearize.ops.chunks import state_dtype
from linearize.training.losses import chunked_kl

# far from every seed that an evaluation is likely to be given
SEED = 777_001


# where a divergence from the base has a slope: not at 1
RECALL_GATES, TEXT_GATES = (1.0, 0.5), (0.75, 0.25)


CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Probe:
    """Rows whose loss says what a head is good for.

    Attributes:
        ids: [rows, T].
        loss: of the gated model on the row of this number.
        gates: where `gradient` takes the slope.
        queries, far: `lookup` asks of these positions, [Q], how much they attend to those keys, [Q, T] bool.
    """

    name: str
    ids: Tensor
    loss: Callable[[PreTrainedModel, int], Tensor]
    gates: tuple[float, ...]
    queries: Tensor
    far: Tensor


def recall_probe(distance: int, rows: int, vocabulary: int, start_token: int | None) -> Probe:
    """Copies that come again after `distance` tokens."""
    task = recall_task(distance, rows, vocabulary, start_token, SEED)
    T = task.ids.shape[1]
    queries = torch.arange(T - task.counted - 1, T - 1)
    # the token that came after the current one last time
    far = torch.arange(T) == (queries + 1 - distance)[:, None]

    def loss(gated: PreTrainedModel, number: int) -> Tensor:
        return loss_of_last(gated, task.ids[number], task.counted)

    return Probe(f"recall at distance {distance}", task.ids, loss, RECALL_GATES, queries, far)


FACT = " To open the {thing} of {owner}, enter {number}.\n"


QUESTION = "\nTo open the {thing} of {owner}, enter"


THINGS = ("locker", "suitcase", "safe", "garden gate", "bicycle lock", "archive", "workshop", "cellar")


OWNERS = ("Miriam", "Oscar", "Helena", "Tobias", "Ingrid", "Marcus", "Beatrice", "Conrad")


# tokens of text before the farthest fact: what is read there is not the sinks
BEFORE = 64


def facts_probe(
    encode: Callable[[str], list[int]], text: Sequence[int], window: int, distance: int, rows: int
) -> Probe:
    """Made-up facts in text, each asked for another number of tokens later, all above `window`, at most `distance`.

    Args:
        encode: text to token ids, without special tokens.
        text: token ids to fill the rows with, at least `distance` + 2 BEFORE.
    """
    generator = torch.Generator().manual_seed(SEED + distance)

    def pick(options: Sequence[Any]) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def fact() -> tuple[list[int], list[int], list[int]]:
        about = {"thing": pick(THINGS), "owner": pick(OWNERS)}
        number = str(10_000 + pick(range(90_000)))
        question, answered = (encode(QUESTION.format(**about) + end) for end in ("", f" {number}"))
        return encode(FACT.format(**about, number=number)), question, answered[len(question) :]

    # as long as the first one's answer is in tokens, so that rows have the same positions to ask about
    drawn = [fact() for _ in range(64 * rows)]
    drawn = [found for found in drawn if len(found[2]) == len(drawn[0][2])][:rows]
    length, asked = distance + 2 * BEFORE, len(drawn[0][2])
    made, far = [], torch.zeros(length, dtype=torch.bool)
    for number, (stated, question, answer) in enumerate(drawn):
        after = max(0, window + (number + 1) * (distance - window) // rows - len(question))
        before = length - after - sum(map(len, (stated, question, answer)))
        start = number * length % max(1, len(text) - length)
        filler = list(text[start : start + before + after])
        made.append([*filler[:before], *stated, *filler[before:], *question, *answer])
        far[before : before + len(stated)] = True
    ids = torch.tensor(made)

    def loss(gated: PreTrainedModel, number: int) -> Tensor:
        return loss_of_last(gated, ids[number], asked)

    queries = torch.arange(length - asked - 1, length - 1)
    return Probe(f"facts at distance {distance}", ids, loss, RECALL_GATES, queries, far.expand(asked, -1))


@torch.no_grad()
def text_probe(model: PreTrainedModel, ids: Tensor, window: int, sinks: int) -> Probe:
    """Rows of text [rows, T] on which the gated model should do as the base, wherever it sees beyond the window."""
    references = [hidden_states(model, row)[window:] for row in ids]
    head = readout_of(model)

    def loss(gated: PreTrainedModel, number: int) -> Tensor:
        hidden = hidden_states(gated, ids[number])[window:]
        weights = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
        return chunked_kl(hidden, references[number], head, head, weights, CHUNK_TOKENS)

    T = ids.shape[1]
    queries, keys = torch.arange(window, T), torch.arange(T)
    far = (queries[:, None] - keys >= window) & (keys >= sinks)
    return Probe("text", ids, loss, TEXT_GATES, queries, far)


def recall_probes(
    distances: Sequence[int], rows: int, *, window: int, positions: int, vocabulary: int, start_token: int | None
) -> list[Probe]:
    """One for every distance that is outside the window.

    Raises:
        ConfigError: none is, and fits the model's positions.
    """
    fitting = fitting_distances(tuple(distances), window, positions)
    if not fitting:
        raise ConfigError(
            f"keep_softmax: no recall can be scored: of distances {', '.join(map(str, distances))} none is outside the "
            f"window of {window} and inside the model's {positions} positions"
        )
    return [recall_probe(n, rows, vocabulary, start_token) for n in fitting]


def fitting_distances(distances: tuple[int, ...], window: int, positions: int) -> list[int]:
    """The distances outside the window whose rows the model's positions can hold."""
    return [n for n in distances if n > window and n + SPAN + 1 <= positions]


def loss_of_last(gated: PreTrainedModel, row: Tensor, counted: int) -> Tensor:
    """Cross-entropy of the last `counted` tokens of a row, [T]."""
    ids = row[None].to(gated.device)
    logits = gated(input_ids=ids, use_cache=False, logits_to_keep=counted + 1).logits[:, :-1]
    return F.cross_entropy(logits.to(state_dtype(logits)).flatten(0, 1), ids[0, -counted:])


def hidden_states(model: PreTrainedModel, row: Tensor) -> Tensor:
    """[T, D] of a row of ids, [T]."""
    return model.base_model(input_ids=row[None].to(model.device), use_cache=False).last_hidden_state[0]
