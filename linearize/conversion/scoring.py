"""Score heads by what the base loses without them, for `--keep-softmax recall:SHARE`, `text:SHARE` and `both:SHARE`.

Every key/value head of the base model, with its query group, has a gate g (linearize/conversion/head_gates.py): its
softmax attention at g = 1, window + sinks at g = 0. Three probes (probes.py) measure the cost of closing gates:

    copies    rows of random tokens whose second copy must be read from the first, far outside the window: cross-entropy
    facts     text with a made-up fact, asked for far outside the window: cross-entropy of the answer
    text      long rows of text: divergence from the base beyond the window

Three methods turn probes into scores:

    swap      the rise of the loss when that head alone goes to g = 0; one forward a head; the definition
    gradient  minus the derivative of the loss by g, averaged over two values of g for all heads; two backwards in all
    lookup    the probability that the head puts on the token to copy, or in text on all tokens beyond the window; one
              forward

A high score means that the head has to keep softmax. `recall` is copies and facts, `both` is these and text. Scores are
added as shares of their totals. `linearize eval` uses other rows, facts and text.

A score tells the worth of a head while all others are there. Heads that can replace each other then all score low, or
all high. A fourth method starts from the gradient's best and measures again after each head that goes:

    elimination   among twice as many heads as keep softmax, the head that is missed least goes, one after another

Shapes: B rows, T tokens, H query heads, J key/value heads, K head dim, Q positions that are asked about.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linearize.conversion.head_gates import GatedAttention, gated_heads
from linearize.conversion.keep_softmax import HeadScores
from linearize.conversion.probes import Probe
from linearize.errors import ConfigError
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.readout import Readout

Progress = Callable[[str], None]
# a layer and a key/value head
Head = tuple[int, int]


def _gradient(stream: LayerStream, attentions: list[GatedAttention], probe: Probe, progress: Progress) -> Tensor:
    """Score by the slope of the loss: [layers, J]."""
    total = _zeros(attentions)
    place = {attention.layer_idx: place for place, attention in enumerate(attentions)}

    def gates_of(layer: int) -> Tensor | None:
        return attentions[place[layer]].head_gates if layer in place else None

    for value in probe.gates:
        for attention in attentions:
            attention.head_gates = torch.full_like(attention.head_gates, value).requires_grad_()
        for layer, slopes in _slopes(stream, probe, gates_of, f"{probe.name}-{value}").items():
            total[place[layer]] -= slopes / (len(probe.gates) * len(probe.rows))
        progress(f"scoring heads by {probe.name}: gradient at gates of {value}")
    for attention in attentions:
        attention.head_gates = torch.ones_like(attention.head_gates).detach()
    return total


def _slopes(
    stream: LayerStream, probe: Probe, gates_of: Callable[[int], Tensor | None], name: str
) -> dict[int, Tensor]:
    """Return the slope of a probe's loss by the gates of every layer, summed over rows.

    Args:
        name: of the pass, which goes on where it was interrupted.
    """
    kept = stream.kept_pass(name)
    batches = stream.start([row[None] for row in probe.rows])
    stream.forward(batches, kept, record=True)

    def slopes_of_last() -> list[Tensor]:
        with stream.readout() as head:
            return [_slope(stream, batch.hidden, probe, head, row) for row, batch in enumerate(batches)]

    slopes = stream.backward(batches, slopes_of_last, gates_of, kept)
    kept.remove()
    return slopes


@torch.enable_grad()
def _slope(stream: LayerStream, hidden: Tensor, probe: Probe, head: Readout, row: int) -> Tensor:
    """Return the gradient [1, T, D] of a row's loss by the output of the last layer."""
    hidden = hidden.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(probe.loss(stream.normalised(hidden)[0], head, row), hidden)
    return gradient


@torch.no_grad()
def _swap(stream: LayerStream, attentions: list[GatedAttention], probe: Probe, progress: Progress) -> Tensor:
    """Score by the rise of the loss when one gate is closed: [layers, J]."""
    loss_of_base = probe.mean_loss(stream)
    scores = _zeros(attentions)
    for layer, attention in enumerate(attentions):
        for head in range(scores.shape[1]):
            attention.head_gates[head] = 0.0
            scores[layer, head] = probe.mean_loss(stream) - loss_of_base
            attention.head_gates[head] = 1.0
        progress(f"scoring heads by {probe.name}: layer {layer + 1} of {len(attentions)}")
    return scores


@torch.no_grad()
def _lookup(stream: LayerStream, attentions: list[GatedAttention], probe: Probe, progress: Progress) -> Tensor:
    """Score by the attention to the keys that the probe marks: [layers, J]."""
    scores = _zeros(attentions)

    def observer(layer: int) -> Callable[[Tensor, Tensor, float], None]:
        row_numbers = itertools.count()  # a layer meets row after row

        def observe(query: Tensor, key: Tensor, scaling: float) -> None:
            row = next(row_numbers)
            queries, far = probe.queries[row].to(stream.device), probe.far[row].to(stream.device)
            T = key.shape[2]
            q = query[:, :, queries].unflatten(1, (key.shape[1], -1))  # [B, J, H/J, Q, K]
            logits = (q @ key.unsqueeze(2).transpose(-1, -2)).float() * scaling
            visible = torch.arange(T, device=key.device)[None, :] <= queries[:, None]
            probability = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            # a group is as good as its best query head
            of_group = (probability * far).sum(-1).mean(-1).amax(-1)
            scores[layer] += of_group.sum(0).cpu() / len(probe.rows)

        return observe

    for layer, attention in enumerate(attentions):
        attention.gating.observe = observer(layer)
    stream.last_hidden(probe.rows)
    progress(f"scoring heads by {probe.name}: where they look")
    return scores


def _zeros(attentions: list[GatedAttention]) -> Tensor:
    return torch.zeros(len(attentions), attentions[0].head_gates.numel())


METHODS: dict[str, Callable[[LayerStream, list[GatedAttention], Probe, Progress], Tensor]] = {
    "gradient": _gradient,
    "swap": _swap,
    "lookup": _lookup,
}


def head_scores(
    stream: LayerStream,
    probes: Sequence[Probe],
    *,
    window: int,
    sinks: int,
    method: str = "gradient",
    layers: Sequence[int] | None = None,
    progress: Progress = lambda text: None,
) -> HeadScores:
    """Score the heads of a base model.

    Args:
        stream: the base model.
        window, sinks: keys that a head sees without softmax attention.
        method: one of METHODS.
        layers: layers to score, all by default; heads of the others get 0.

    Returns:
        Scores [layers][key/value heads], the mean over probes, larger for heads that the probes need more.

    Raises:
        ConfigError: an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"method: got '{method}', allowed are {', '.join(METHODS)}")
    count = len(stream.layers)
    layers = range(count) if layers is None else layers
    with gated_heads(stream.model, window, sinks, layers, stream.device) as attentions:
        total = _zeros(attentions)
        for probe in probes:
            total += METHODS[method](stream, attentions, probe, progress)
    scores = dict(zip(layers, (total / len(probes)).tolist()))
    unscored = [0.0] * total.shape[1]
    return [scores.get(layer, list(unscored)) for layer in range(count)]


@torch.no_grad()
def eliminate(
    stream: LayerStream,
    groups: Sequence[Sequence[Probe]],
    scores: HeadScores,
    count: int,
    *,
    window: int,
    sinks: int,
    layers: Sequence[int],
    progress: Progress = lambda text: None,
) -> HeadScores:
    """Choose heads by backward elimination, some 1.5 count² forwards over all rows.

    Start with the 2 `count` heads that score best, and take out the head without which the loss is lowest, until
    `count` heads are left. The loss is the mean over groups of the share that each loses: 0 for the base, 1 without any
    head. A group's loss is the mean of its probes'.

    Args:
        scores: [layers][key/value heads], of another method.
        layers: layers whose heads can go.

    Returns:
        For every head [layers][key/value heads] the turn at which it went, from 1; a larger number for the heads that
        are left; 0 for heads that did not start.
    """
    heads = [(layer, head) for layer in layers for head in range(len(scores[layer]))]
    remaining = sorted(heads, key=lambda head: -scores[head[0]][head[1]])[: 2 * count]
    turns = torch.zeros(len(scores), len(scores[0]))
    with gated_heads(stream.model, window, sinks, layers, stream.device) as attentions:
        by_layer = dict(zip(layers, attentions))

        def losses(softmax_heads: Sequence[Head]) -> Tensor:
            _open_gates(by_layer, softmax_heads)
            return torch.tensor([_group_loss(stream, group) for group in groups])

        of_base = losses(heads)
        at_stake = losses([]) - of_base
        # a group that loses nothing without any head has nothing at stake, and counts for nothing
        shares = torch.where(at_stake > 0, 1 / at_stake, 0.0)
        for turn in range(1, len(remaining) - count + 1):
            lost_without = {
                head: ((losses([other for other in remaining if other != head]) - of_base) * shares).mean().item()
                for head in remaining
            }
            least = min(remaining, key=lost_without.__getitem__)
            remaining.remove(least)
            turns[least] = turn
            progress(
                f"scoring heads by elimination: {least[0]}:{least[1]} goes, {len(remaining)} are left, which lose "
                f"{lost_without[least]:.1%} of what there is to lose"
            )
    last = turns.max() + 1
    for head in remaining:
        turns[head] = last
    return turns.tolist()


def _open_gates(attentions: dict[int, GatedAttention], heads: Sequence[Head]) -> None:
    """Set the gates of `heads` to 1 and all others to 0; `attentions` are the gated modules by layer."""
    for layer, attention in attentions.items():
        for head in range(attention.head_gates.numel()):
            attention.head_gates[head] = float((layer, head) in heads)


def _group_loss(stream: LayerStream, group: Sequence[Probe]) -> float:
    """Return the mean loss over the rows of all probes of a group."""
    losses = [loss for probe in group for loss in probe.losses(stream)]
    return sum(losses) / len(losses)


def combined(*scores: HeadScores) -> HeadScores:
    """Add scores, each as its share of its total. Negative scores count as 0."""
    total = torch.zeros(len(scores[0]), len(scores[0][0]))
    for of_method in scores:
        positive = torch.tensor(of_method).clamp(min=0)
        total += positive / positive.sum().clamp(min=1e-12)
    return total.tolist()
