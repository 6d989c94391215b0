"""Which key/value heads have to keep softmax: scores for `--keep-softmax recall:SHARE`, `text:SHARE` and `both:SHARE`.

Every key/value head of the base model, with its query group, gets a gate g between its softmax attention (g = 1) and
window + sinks (g = 0). Three probes say what that costs:

    copies    rows of random tokens whose second copy must be read from the first, far outside the window: cross-entropy
    facts     text with a made-up fact, asked for far outside the window: cross-entropy of the answer
    text      long rows of text: divergence from the base beyond the window

and three methods ask them:

    swap      the rise of the loss when that head alone goes to g = 0; one forward a head, the definition
    gradient  minus the derivative of the loss by g, averaged over two values of g for all heads; two backwards in all
    lookup    the probability that the head puts on the token to copy, or in text on all that lies beyond the window; one
              forward

A high score means that the head has to keep softmax. `recall` is copies and facts, `both` that and text; where scores are
added, each counts as its share of its total. Rows, facts and text are not those that `linearize eval` uses.

A score says what a head is worth while all others are there. Heads that stand in for one another then all score low, or all
high, so a fourth method starts from the gradient's best and asks again whenever one has gone:

    elimination   of twice as many heads as are to be kept, the one that is missed least goes, one after another

Shapes: B rows, T tokens, H query heads, J key/value heads, K head dim.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from linearize.conversion.probes import Probe, hidden_states
from linearize.errors import ConfigError
from linearize.families.registry import find_family
from linearize.ops.window import Scores, window_attention

IMPLEMENTATION = "linearize_scoring"
METHODS = ("gradient", "swap", "lookup")
# nats a token that the answers have to cost more without what lies beyond the window
READS = 0.5


def answers(model: PreTrainedModel, probe: Probe, *, window: int, sinks: int) -> bool:
    """Whether the base reads from beyond the window what the probe asks for: a loss lower by more than READS without gates."""
    with torch.no_grad(), _gated(model, window, sinks) as attentions:
        losses = []
        for value in (1.0, 0.0):
            for attention in attentions:
                attention.head_gates.fill_(value)
            losses.append(sum(probe.loss(model, number).item() for number in range(len(probe.ids))) / len(probe.ids))
    return losses[1] - losses[0] > READS


def head_scores(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    *,
    window: int,
    sinks: int,
    method: str = "gradient",
    layers: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[list[float]]:
    """Scores [layers][key/value heads], the mean over probes, larger for heads that they need more.

    Args:
        model: the base model, as transformers loads it.
        layers: those to score, all by default; the heads of the others get 0.

    Raises:
        ConfigError: an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"method: got '{method}', allowed are {', '.join(METHODS)}")
    layers = range(model.config.num_hidden_layers) if layers is None else layers
    with _gated(model, window, sinks, layers) as attentions:
        run = {"gradient": _gradient, "swap": _swap, "lookup": _lookup}[method]
        scores = sum(run(model, attentions, probe, progress) for probe in probes) / len(probes)
    found = dict(zip(layers, scores.tolist()))
    return [found.get(i, [0.0] * scores.shape[1]) for i in range(model.config.num_hidden_layers)]


@torch.no_grad()
def eliminate(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Probe]],
    scores: list[list[float]],
    keep: int,
    *,
    window: int,
    sinks: int,
    layers: Sequence[int],
    progress: Callable[[str], None] = lambda text: None,
) -> list[list[float]]:
    """Backward elimination: from the 2 `keep` heads that score best, the one without which the loss is lowest goes, until
    `keep` are left.

    The loss is the mean over groups of what each loses, the base being 0 and no head at all 1; a group's is the mean of its
    probes'. Some 1.5 keep² forwards over all rows.

    Args:
        scores: [layers][key/value heads], of another method.
        layers: those whose heads can go.

    Returns:
        [layers][key/value heads]: the turn at which a head went, from 1; more for those kept; 0 for those never asked about.
    """
    heads = [(layer, head) for layer in layers for head in range(len(scores[layer]))]
    left = sorted(heads, key=lambda at: -scores[at[0]][at[1]])[: 2 * keep]
    turns = torch.zeros(len(scores), len(scores[0]))
    with _gated(model, window, sinks, layers) as attentions:

        def losses(kept: Sequence[tuple[int, int]]) -> Tensor:
            for layer, attention in zip(layers, attentions):
                for head in range(attention.head_gates.numel()):
                    attention.head_gates[head] = float((layer, head) in kept)
            each = [
                [probe.loss(model, row).item() for probe in group for row in range(len(probe.ids))] for group in groups
            ]
            return torch.tensor([sum(found) / len(found) for found in each])

        best = losses(heads)
        stakes = losses([]) - best
        shares = torch.where(stakes > 0, 1 / stakes, 0.0)  # where nothing is lost without any head, nothing is at stake
        for turn in range(1, len(left) - keep + 1):
            without = {at: ((losses([x for x in left if x != at]) - best) * shares).mean().item() for at in left}
            gone = min(left, key=without.get)
            left.remove(gone)
            turns[gone] = turn
            progress(
                f"scoring heads by elimination: {gone[0]}:{gone[1]} goes, {len(left)} are left, which lose "
                f"{without[gone]:.1%} of what there is to lose"
            )
    last = turns.max() + 1
    for at in left:
        turns[at] = last
    return turns.tolist()


def combined(*scores: list[list[float]]) -> list[list[float]]:
    """The sum of scores, each as its share of its total; what is below nothing counts as nothing."""
    total = sum(x / x.sum().clamp(min=1e-12) for x in (torch.tensor(s).clamp(min=0) for s in scores))
    return total.tolist()


@contextlib.contextmanager
def _gated(model: PreTrainedModel, window: int, sinks: int, layers: Sequence[int] | None = None) -> Iterator[list]:
    """Inside, the attention of the given layers (all by default) mixes softmax and window + sinks by its `head_gates`, [J]."""
    family = find_family(model.config.model_type)
    layers = range(model.config.num_hidden_layers) if layers is None else layers
    attentions = [getattr(model.base_model.layers[i], family.attention_attribute) for i in layers]
    heads = family.heads(model.config.to_dict())["num_key_value_heads"]
    routed = copy.copy(model.config)
    routed._attn_implementation_internal = IMPLEMENTATION
    for attention in attentions:
        attention.head_gates = torch.ones(heads, device=model.device)
        attention.scoring = {"window": window, "sinks": sinks, "lookup": None}
        attention.config = routed
    try:
        yield attentions
    finally:
        for attention in attentions:
            attention.config = model.config
            del attention.head_gates, attention.scoring


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    scaling: float,
    softcap=None,
    s_aux=None,
    sliding_window=None,
    **kwargs,
):
    """q [B, H, T, K], k and v [B, J, T, K], after rotary; returns [B, T, H, K]."""
    group = query.shape[1] // key.shape[1]
    reach = min(sliding_window or query.shape[2], query.shape[2])
    scores = Scores(scaling, softcap, s_aux)
    if reach < query.shape[2] or softcap is not None or s_aux is not None:
        rows = (x.transpose(1, 2) for x in (query, key, value))
        full = window_attention(*rows, window=reach, **vars(scores))[0].transpose(1, 2)
    else:
        full = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=group > 1)
    settings = module.scoring
    if settings["lookup"] is not None:
        settings["lookup"](query, key, scaling)
    if bool((module.head_gates == 1).all()) and not module.head_gates.requires_grad:
        return full.transpose(1, 2), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    T, sinks = q.shape[1], min(settings["sinks"], q.shape[1])
    slots = torch.arange(T, device=q.device)
    left = (slots[:, None] - slots[None, :sinks] >= settings["window"])[None]
    near, _ = window_attention(
        q, k, v, window=settings["window"], sink_keys=k[:, :sinks], sink_values=v[:, :sinks], sink_mask=left,
        **vars(scores),
    )  # fmt: skip
    gates = module.head_gates.repeat_interleave(group).to(q.dtype)[:, None]
    return gates * full.transpose(1, 2) + (1 - gates) * near, None


AttentionInterface.register(IMPLEMENTATION, _attend)


@torch.enable_grad()
def _gradient(model, attentions, probe, progress) -> Tensor:
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    total = torch.zeros(len(attentions), attentions[0].head_gates.numel())
    for value in probe.gates:
        for number in range(len(probe.ids)):
            gates = [torch.full_like(a.head_gates, value).requires_grad_() for a in attentions]
            for attention, gate in zip(attentions, gates):
                attention.head_gates = gate
            found = torch.autograd.grad(probe.loss(model, number), gates)
            total -= torch.stack(found).cpu() / (len(probe.gates) * len(probe.ids))
        progress(f"scoring heads by {probe.name}: gradient at gates of {value}")
    for attention in attentions:
        attention.head_gates = torch.ones_like(attention.head_gates).detach()
    for parameter in frozen:
        parameter.requires_grad_(True)
    return total


@torch.no_grad()
def _swap(model, attentions, probe, progress) -> Tensor:
    def loss() -> float:
        return sum(probe.loss(model, number).item() for number in range(len(probe.ids))) / len(probe.ids)

    whole = loss()
    scores = torch.zeros(len(attentions), attentions[0].head_gates.numel())
    for layer, attention in enumerate(attentions):
        for head in range(scores.shape[1]):
            attention.head_gates[head] = 0.0
            scores[layer, head] = loss() - whole
            attention.head_gates[head] = 1.0
        progress(f"scoring heads by {probe.name}: layer {layer + 1} of {len(attentions)}")
    return scores


@torch.no_grad()
def _lookup(model, attentions, probe, progress) -> Tensor:
    T = probe.ids.shape[1]
    queries, far = probe.queries.to(model.device), probe.far.to(model.device)
    scores = torch.zeros(len(attentions), attentions[0].head_gates.numel())

    def listener(layer: int) -> Callable:
        def listen(query: Tensor, key: Tensor, scaling: float) -> None:
            J = key.shape[1]
            q = query[:, :, queries].unflatten(1, (J, -1))
            logits = (q @ key.unsqueeze(2).transpose(-1, -2)).float() * scaling
            visible = torch.arange(T, device=key.device)[None, :] <= queries[:, None]
            probability = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            # of the best query head in the group
            picked = (probability * far).sum(-1).mean(-1).amax(-1)
            scores[layer] += picked.sum(0).cpu() / len(probe.ids)

        return listen

    for layer, attention in enumerate(attentions):
        attention.scoring["lookup"] = listener(layer)
    for row in probe.ids:
        hidden_states(model, row)
    progress(f"scoring heads by {probe.name}: where they look")
    return scores
