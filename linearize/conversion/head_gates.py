"""Put a gate on every key/value head of a base model, between its softmax attention and window + sinks.

The output of a head with gate g is g · softmax(q, all keys) + (1 − g) · softmax(q, window and sinks). Gates of 1 leave
the base as it is. A gate of 0 does to a head what its conversion without a recurrent branch would do.

Shapes: B rows, T tokens, H query heads, J key/value heads, K head dim.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from linearize.families.registry import find_family
from linearize.ops.window import Scores, window_attention
from linearize.plan import PREFIX

# name under which transformers knows the gated attention
IMPLEMENTATION = "linearize_scoring"


@dataclass
class Gating:
    """Settings of the gated attention of one layer.

    Attributes:
        window, sinks: keys that a head with gate 0 sees.
        observe: called with queries [B, H, T, K], keys [B, J, T, K] and the scale; None: nobody observes.
    """

    window: int
    sinks: int
    observe: Callable[[Tensor, Tensor, float], None] | None = None


class GatedAttention(Protocol):
    """An attention module of the base model while its heads are gated.

    Attributes:
        layer_idx: index of its layer.
        head_gates: gates of the key/value heads, [J].
    """

    layer_idx: int
    head_gates: Tensor
    gating: Gating
    config: PretrainedConfig


@contextlib.contextmanager
def gated_heads(
    model: PreTrainedModel,
    window: int,
    sinks: int,
    layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[list[GatedAttention]]:
    """Gate the heads of `layers` (all by default) while the block runs; all gates start at 1.

    Yields:
        The attention modules of these layers.
    """
    family = find_family(model.config.model_type.removeprefix(PREFIX))
    layers = range(model.config.num_hidden_layers) if layers is None else layers
    attentions = [getattr(model.base_model.layers[i], family.attention_attribute) for i in layers]
    heads = family.heads(model.config.to_dict())["num_key_value_heads"]
    gated_config = copy.copy(model.config)
    gated_config._attn_implementation_internal = IMPLEMENTATION
    for attention in attentions:
        attention.head_gates = torch.ones(heads, device=device)
        attention.gating = Gating(window, sinks)
        attention.config = gated_config
    try:
        yield attentions
    finally:
        for attention in attentions:
            attention.config = model.config
            del attention.head_gates, attention.gating


def _attend(
    module: GatedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the gated attention, as an attention function of transformers.

    Args:
        query: [B, H, T, K] after rotary. key, value: [B, J, T, K].
        softcap, s_aux: the family's cap on scores, and its learned sinks.

    Returns:
        The output [B, T, H, K], and None in place of attention weights.
    """
    gating, gates = module.gating, module.head_gates
    group = query.shape[1] // key.shape[1]
    scores = Scores(scaling, softcap, s_aux)
    full = _softmax_attention(query, key, value, scores, sliding_window)
    if gating.observe is not None:
        gating.observe(query, key, scaling)
    if bool((gates == 1).all()) and not (gates.requires_grad and torch.is_grad_enabled()):
        return full, None
    near = _window_and_sinks(query, key, value, scores, gating)
    by_query_head = gates.repeat_interleave(group).to(query.dtype)[:, None]
    return by_query_head * full + (1 - by_query_head) * near, None


AttentionInterface.register(IMPLEMENTATION, _attend)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, scores: Scores, sliding_window: int | None) -> Tensor:
    """Compute the base's own attention, causal and within its sliding window; returns [B, T, H, K]."""
    T, group = query.shape[2], query.shape[1] // key.shape[1]
    reach = min(sliding_window or T, T)
    if reach < T or scores.softcap is not None or scores.learned_sinks is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return window_attention(q, k, v, window=reach, **vars(scores))[0]
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scale, enable_gqa=group > 1)
    return output.transpose(1, 2)


def _window_and_sinks(query: Tensor, key: Tensor, value: Tensor, scores: Scores, gating: Gating) -> Tensor:
    """Compute attention to the window and to those sinks that have left it; returns [B, T, H, K]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    T = q.shape[1]
    sinks, positions = min(gating.sinks, T), torch.arange(T, device=q.device)
    outside_window = (positions[:, None] - positions[None, :sinks] >= gating.window)[None]
    output, _ = window_attention(
        q,
        k,
        v,
        window=gating.window,
        sink_keys=k[:, :sinks],
        sink_values=v[:, :sinks],
        sink_mask=outside_window,
        **vars(scores),
    )
    return output
