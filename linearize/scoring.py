"""Which key/value heads recall depends on: scores for `--keep-softmax recall:SHARE`.

Every key/value head of the base model, with its query group, gets a gate g between its softmax attention (g = 1) and
window + sinks (g = 0). On rows of random tokens whose second copy must be read from the first, far outside the window:

    swap      the rise of the loss when that head alone goes to g = 0; one forward a head, the definition
    gradient  minus the derivative of the loss by g, averaged over g = 1 and g = 1/2 for all heads; two backwards in all
    lookup    the probability that the head puts on the token to copy; one forward

A high score means that the head has to keep softmax. The rows are not those that `linearize eval` uses.

Shapes: B rows, T tokens, H query heads, J key/value heads, K head dim.
"""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.writing import write_json
from linearize.errors import ConfigError
from linearize.evaluation.recall import SPAN, recall_task
from linearize.families.registry import find_family
from linearize.ops.chunks import state_dtype
from linearize.ops.window import Scores, window_attention

IMPLEMENTATION = "linearize_scoring"
METHODS = ("gradient", "swap", "lookup")
# far from every seed that an evaluation is likely to be given
SEED = 777_001
DISTANCES = (512, 1024)
ROWS = 2
HALF = (1.0, 0.5)


def head_scores(
    model: PreTrainedModel,
    *,
    window: int,
    sinks: int,
    vocabulary: int,
    start_token: int | None,
    method: str = "gradient",
    distances: tuple[int, ...] = DISTANCES,
    rows: int = ROWS,
    layers: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[list[float]]:
    """Scores [layers][key/value heads], larger for heads that recall needs more.

    Args:
        model: the base model, as transformers loads it.
        distances: between the copies; those within the window say nothing.
        layers: those to score, all by default; the heads of the others get 0.

    Raises:
        ConfigError: an unknown method, or no distance outside the window fits the model's positions.
    """
    if method not in METHODS:
        raise ConfigError(f"method: got '{method}', allowed are {', '.join(METHODS)}")
    limit = model.config.max_position_embeddings
    fitting = fitting_distances(distances, window, limit)
    if not fitting:
        raise ConfigError(
            f"keep_softmax: no recall can be scored: of distances {', '.join(map(str, distances))} none is outside the "
            f"window of {window} and inside the model's {limit} positions"
        )
    tasks = [recall_task(n, rows, vocabulary, start_token, SEED) for n in fitting]
    layers = range(model.config.num_hidden_layers) if layers is None else layers
    with _gated(model, window, sinks, layers) as attentions:
        run = {"gradient": _gradient, "swap": _swap, "lookup": _lookup}[method]
        scores = sum(run(model, attentions, task, progress) for task in tasks) / len(tasks)
    found = dict(zip(layers, scores.tolist()))
    return [found.get(i, [0.0] * scores.shape[1]) for i in range(model.config.num_hidden_layers)]


def fitting_distances(distances: tuple[int, ...], window: int, positions: int) -> list[int]:
    """The distances outside the window whose rows the model's positions can hold."""
    return [n for n in distances if n > window and n + SPAN + 1 <= positions]


def cached_scores(key: dict[str, Any], compute: Callable[[], list[list[float]]]) -> list[list[float]]:
    """Scores kept under the base's fingerprint and the settings in `key`, computed where there are none yet."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linearize" / "scores"
    path = folder / f"{fingerprint_of(key)}.json"
    if path.is_file():
        return json.loads(path.read_bytes())["scores"]
    scores = compute()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "scores": scores})
    return scores


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


def _loss(model: PreTrainedModel, ids: Tensor, counted: int) -> Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=counted + 1).logits[:, :-1]
    logits = logits.to(state_dtype(logits))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, -counted:].flatten())


@torch.enable_grad()
def _gradient(model, attentions, task, progress) -> Tensor:
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    total = torch.zeros(len(attentions), attentions[0].head_gates.numel())
    for value in HALF:
        for row in task.ids:
            gates = [torch.full_like(a.head_gates, value).requires_grad_() for a in attentions]
            for attention, gate in zip(attentions, gates):
                attention.head_gates = gate
            loss = _loss(model, row[None].to(model.device), task.counted)
            found = torch.autograd.grad(loss, gates)
            total -= torch.stack(found).cpu() / (len(HALF) * len(task.ids))
        progress(f"scoring heads at distance {task.distance}: gradient at gates of {value}")
    for attention in attentions:
        attention.head_gates = torch.ones_like(attention.head_gates).detach()
    for parameter in frozen:
        parameter.requires_grad_(True)
    return total


@torch.no_grad()
def _swap(model, attentions, task, progress) -> Tensor:
    def loss() -> float:
        return sum(_loss(model, row[None].to(model.device), task.counted).item() for row in task.ids) / len(task.ids)

    whole = loss()
    scores = torch.zeros(len(attentions), attentions[0].head_gates.numel())
    for layer, attention in enumerate(attentions):
        for head in range(scores.shape[1]):
            attention.head_gates[head] = 0.0
            scores[layer, head] = loss() - whole
            attention.head_gates[head] = 1.0
        progress(f"scoring heads at distance {task.distance}: layer {layer + 1} of {len(attentions)}")
    return scores


@torch.no_grad()
def _lookup(model, attentions, task, progress) -> Tensor:
    T = task.ids.shape[1]
    queries = torch.arange(T - task.counted - 1, T - 1, device=model.device)
    wanted = queries + 1 - task.distance  # the token that came after the current one last time
    scores = torch.zeros(len(attentions), attentions[0].head_gates.numel())

    def listener(layer: int) -> Callable:
        def listen(query: Tensor, key: Tensor, scaling: float) -> None:
            J = key.shape[1]
            q = query[:, :, queries].unflatten(1, (J, -1))
            logits = (q @ key.unsqueeze(2).transpose(-1, -2)).float() * scaling
            visible = torch.arange(T, device=key.device)[None, :] <= queries[:, None]
            probability = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            picked = probability.gather(-1, wanted.view(1, 1, 1, -1, 1).expand(*probability.shape[:-1], 1))
            # of the best query head in the group
            scores[layer] += picked.mean((-1, -2)).amax(-1).sum(0).cpu() / len(task.ids)

        return listen

    for layer, attention in enumerate(attentions):
        attention.scoring["lookup"] = listener(layer)
    for row in task.ids:
        model.base_model(input_ids=row[None].to(model.device), use_cache=False)
    progress(f"scoring heads at distance {task.distance}: probability of the token to copy")
    return scores
