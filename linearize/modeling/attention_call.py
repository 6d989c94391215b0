"""Define what passes between a linearized layer, its attention and an observer of it.

Shapes: B batch, T tokens, S tokens in reach, D hidden size, H query heads, J key/value heads, K head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from linearize.modeling.window_heads import WindowHeads
from linearize.ops.window import Scores


@dataclass
class AttentionCall:
    """The inputs of `attend` besides q, k and v, passed through the family's forward as one extra keyword.

    Attributes:
        cache: the model's cache, None without one.
        position_embeddings: cos and sin of the rotary positions, [B or 1, T, rotated width].
        padding_mask: [B, S] bool, False for padding; None without padding.
        segments: [B, T] document numbers of packed rows; None for one document a row.
        hidden_states: [B, T, D], the input of the layer's projections.
    """

    cache: Cache | None
    position_embeddings: tuple[Tensor, Tensor]
    padding_mask: Tensor | None
    segments: Tensor | None
    hidden_states: Tensor


class Projections(NamedTuple):
    """Queries [B, H, T, K], keys and values [B, J, T, K] of a layer; of some heads: [B, T, heads, K]."""

    q: Tensor
    q_rotary: Tensor
    k: Tensor
    k_rotary: Tensor
    v: Tensor


@dataclass
class SoftmaxModule:
    """The module that an attention function sees when a layer's softmax heads have learned sinks.

    An eager implementation reads the sinks from its module, where those of all heads lie; this one has those of the
    softmax heads.
    """

    sinks: Tensor
    num_key_value_groups: int
    training: bool
    layer_idx: int
    config: PreTrainedConfig
    is_causal: bool = True


@dataclass
class Observation:
    """One layer's linear heads beside the softmax attention that they replace, as an observer is shown them.

    Attributes:
        layer: index of the layer.
        heads: the layer's linear heads.
        q, q_rotary, k, k_rotary, v: their queries [B, T, H, K], keys and values [B, T, J, K].
        hidden_states: [B, T, D], the input of the layer's projections.
        target: the base model's attention output of the same heads, [B, T, H, K].
        scores: the base model's score function for these heads.
        run: computes the linear heads' own output, [B, T, H, K].
    """

    layer: int
    heads: WindowHeads
    q: Tensor
    q_rotary: Tensor
    k: Tensor
    k_rotary: Tensor
    v: Tensor
    hidden_states: Tensor
    target: Tensor
    scores: Scores
    run: Callable[[], Tensor]
