"""The attention of a linearized layer, laid over the family's own attention class.

The path of a hidden state through one layer (B batch, T tokens, H query heads, J key/value heads, K head dim):

    decoder mixin (factory.py)     hidden states [B, T, D]; adds padding_mask [B, S] and segments [B, T] as keywords
    family decoder layer           norms, residuals and MLP stay the family's own
    LinearizedAttention.forward    takes the cache away and sets rotary to the identity
    family attention forward       projections, biases, norms: q [B, H, T, K], k and v [B, J, T, K], before rotary
    attention interface            transformers calls `_attend`, the implementation registered as "linearize"
    LinearizedAttention.attend     applies the family's rotary, then shares the heads out:
      softmax heads                  the family's softmax, over all keys or over window + sinks (window_heads.py)
      linear heads                   window + sinks (ops/window.py) and recurrent branch, [B, T, heads, K] each
        recurrent branch (mixers/)     one mixer, chunk by chunk with ops/, state [B, J, *state_shape] in float32
        mix (mix.py)                   one output of the two
    family attention forward       all heads in their order again, [B, T, H, K]; output projection: [B, T, D]

The family keeps projections, biases, norms, rotary and output projection. Its forward gets the identity as rotary so
that queries and keys arrive at `attend` as the projections left them; many mixers read them like that.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.families.family import Family
from linearize.mixers.mixer import Site
from linearize.modeling.attention_call import AttentionCall, Observation, Projections, SoftmaxModule
from linearize.modeling.cache import adopt_layer
from linearize.modeling.context import context_of
from linearize.modeling.linear_heads import build_linear_heads
from linearize.modeling.packing import Packing
from linearize.modeling.window_cache import WindowCache
from linearize.modeling.window_heads import WindowHeads, build_softmax_window_heads
from linearize.ops.window import Scores
from linearize.plan import LayerPlan

IMPLEMENTATION = "linearize"
# the name of the cache's argument in transformers up to 5.23, from 5.24 on, and in GPT-NeoX
CACHE_ARGUMENTS = ("past_key_values", "cache", "layer_past")


def _attend(
    module: "LinearizedAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    linearize_call: AttentionCall,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as an implementation of transformers' attention interface."""
    return module.attend(query, key, value, attention_mask, linearize_call, **kwargs), None


AttentionInterface.register(IMPLEMENTATION, _attend)


class LinearizedAttention(nn.Module):
    """A mixin that the factory puts before the family's attention class.

    Some key/value heads keep softmax, the others are linear. In softmax mode (`linear = False`) the class is the
    family's own. While it has an `observer`, all heads keep softmax and the observer is called with an `Observation`.
    A tensor that it returns takes the place of the linear heads' output.

    Attributes:
        linear: false in softmax mode.
        softmax_heads, linear_heads: key/value heads of each kind, ascending.
        query_group: query heads per key/value head.
        group_order: for every key/value head, its place among the softmax heads followed by the linear heads.
        mixer: the linear heads, None without any. Its name is part of every added parameter's name in a checkpoint.
        softmax_window_heads: the softmax heads if they have a window, else None.
        softmax_config, linear_config: the model's config, and the copy that routes this layer's attention to `attend`.
        config: one of the two, read by the family's forward.
        partial_rotary: true if the family's class itself cuts q and k to the rotated part.
        rotates: true if this layer rotates queries and keys.
        family_module_name: name of the module that defines the family's class. (A layer that held the module itself
            could be neither copied nor pickled.)
        call_names: positional parameters of the family's forward.
        cache_name: the one among them that takes the cache.
        layer_keywords: padding mask and segments, in families whose decoder layer drops keywords that it does not know.
    """

    observer: Callable[[Observation], Tensor | None] | None = None
    linear: bool
    softmax_heads: tuple[int, ...]
    linear_heads: tuple[int, ...]
    query_group: int
    group_order: list[int]
    mixer: WindowHeads | None
    softmax_window_heads: WindowHeads | None
    config: PreTrainedConfig
    softmax_config: PreTrainedConfig
    linear_config: PreTrainedConfig
    partial_rotary: bool
    rotates: bool
    family_module_name: str
    call_names: list[str]
    cache_name: str
    layer_keywords: dict[str, Tensor | None]
    layer_idx: int  # set by the family

    def setup(self, plan: LayerPlan, site: Site, config: PreTrainedConfig, family: Family, *, rotates: bool) -> None:
        """Turn an instance of the family's class into this one, in place.

        Args:
            site: the place of the linear heads.
            config: the copy of the model's config that routes this layer's attention to `attend`.
            rotates: true if this layer rotates queries and keys.
        """
        self.softmax_heads, self.linear_heads, self.query_group = plan.softmax_heads, site.heads, site.group
        order = [*self.softmax_heads, *self.linear_heads]
        self.group_order = [order.index(head) for head in range(site.total_heads)]
        self.mixer = build_linear_heads(plan, site, config.hidden_size) if site.heads else None
        self.softmax_window_heads = build_softmax_window_heads(plan, site)
        self.partial_rotary, self.rotates = family.partial_rotary, rotates

        base = next(base for base in type(self).__mro__ if base.__module__.startswith("transformers.models"))
        self.family_module_name = base.__module__
        self.call_names = list(inspect.signature(super().forward).parameters)
        self.cache_name = next(name for name in CACHE_ARGUMENTS if name in self.call_names)
        self.layer_keywords = {}
        self.softmax_config, self.linear_config = self.config, config
        self.set_linear(True)

    @property
    def family_module(self) -> ModuleType:
        """The family's modelling module, for its own rotary and its eager attention."""
        return sys.modules[self.family_module_name]

    def set_linear(self, linear: bool) -> None:
        """Switch between the linearized layer and the family's softmax attention on the same weights."""
        self.linear = linear
        self.config = self.linear_config if linear else self.softmax_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the family's forward, with the cache taken away and rotary set to the identity."""
        if not self.linear:
            return super().forward(*args, **kwargs)
        kwargs |= self.layer_keywords
        padding_mask, segments = kwargs.pop("padding_mask", None), kwargs.pop("segments", None)
        kwargs.update(zip(self.call_names, args))
        cache = kwargs.pop(self.cache_name, None)
        cos, sin = kwargs["position_embeddings"]
        call = AttentionCall(cache, (cos, sin), padding_mask, segments, kwargs["hidden_states"])
        # one position is enough to say "no rotation" to all of them
        kwargs["position_embeddings"] = (torch.ones_like(cos[:, :1]), torch.zeros_like(sin[:, :1]))
        return super().forward(**kwargs, linearize_call=call)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        call: AttentionCall,
        *,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend with every head as its kind does.

        Args:
            q: [B, H, T, K], before rotary.
            k, v: [B, J, T, K], keys before rotary.
            attention_mask: the mask that the family made for its softmax attention.
            scaling: factor of the scores.
            softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
            s_aux: [H], a learned score in every head's normaliser that no value belongs to (gpt-oss).

        Returns:
            [B, T, H, K].
        """
        assert k.shape[2] == q.shape[2], "the family's forward met a cache that should have been taken away"
        assert k.shape[1] == len(self.softmax_heads) + len(self.linear_heads), "the config counts other heads"
        q_rotary, k_rotary = self._rotate(q, k, *call.position_embeddings)
        projections = Projections(q, q_rotary, k, k_rotary, v)
        scores = Scores(scaling, softcap, s_aux)
        if self.observer is not None:
            return self._observe(self.observer, projections, attention_mask, call, scores, **kwargs)
        layer = None
        if call.cache is not None:
            layer = adopt_layer(call.cache, self.layer_idx, self._new_caches)
            layer.advance(k, v)
        outputs = []
        if self.softmax_window_heads is not None:
            cache = None if layer is None else layer.softmax_window_cache
            outputs.append(self._windowed(self.softmax_window_heads, projections, call, cache, scores))
        elif self.softmax_heads:
            softmax_scores = self._scores_of(scores, self.softmax_heads)
            q, k, v = (self._of_heads(x, self.softmax_heads) for x in (q_rotary, k_rotary, v))
            if layer is not None:
                k, v = layer.extend_softmax(k, v)
            outputs.append(self._softmax(q, k, v, attention_mask, softmax_scores, dropout=dropout, **kwargs))
        if self.mixer is not None:
            cache = None if layer is None else layer.linear_cache
            outputs.append(self._windowed(self.mixer, projections, call, cache, scores))
        if len(outputs) == 1:
            return outputs[0]
        groups = [group for output in outputs for group in output.split(self.query_group, dim=2)]
        return torch.cat([groups[place] for place in self.group_order], dim=2)

    def _observe(
        self,
        observer: Callable[[Observation], Tensor | None],
        projections: Projections,
        attention_mask: Tensor | None,
        call: AttentionCall,
        scores: Scores,
        **kwargs: Any,
    ) -> Tensor:
        """Attend with softmax in every head, and show the observer what the linear heads have to reproduce."""
        _, q_rotary, _, k_rotary, v = projections
        output = self._softmax(q_rotary, k_rotary, v, attention_mask, scores, **kwargs)
        heads = self.mixer
        if heads is None:
            return output
        replacement = observer(
            Observation(
                self.layer_idx,
                heads,
                *self._projections_of(projections, self.linear_heads),
                hidden_states=call.hidden_states,
                target=self._of_heads(output.transpose(1, 2), self.linear_heads).transpose(1, 2),
                scores=self._scores_of(scores, self.linear_heads),
                run=lambda: self._windowed(heads, projections, call, None, scores),
            )
        )
        if replacement is None:
            return output
        groups = output.unflatten(2, (-1, self.query_group)).clone()
        groups[:, :, list(self.linear_heads)] = replacement.unflatten(2, (-1, self.query_group)).to(output.dtype)
        return groups.flatten(2, 3)

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Apply rotary to queries [B, H, T, K] and keys [B, J, T, K] as the family does in this layer."""
        if not self.rotates:
            return q, k
        rotate = self.family_module.apply_rotary_pos_emb
        if not self.partial_rotary:
            return rotate(q, k, cos, sin)
        width = cos.shape[-1]
        rotated_q, rotated_k = rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat([rotated_q, q[..., width:]], dim=-1), torch.cat([rotated_k, k[..., width:]], dim=-1)

    def _softmax(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scores: Scores, **kwargs: Any
    ) -> Tensor:
        """Run the family's softmax attention on q [B, heads, T, K], k and v [B, heads, S, K]: [B, T, heads, K]."""
        module: nn.Module | SoftmaxModule = self
        if scores.learned_sinks is not None:
            kwargs["s_aux"] = scores.learned_sinks
            module = SoftmaxModule(
                scores.learned_sinks, self.query_group, self.training, self.layer_idx, self.softmax_config
            )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.softmax_config._attn_implementation, self.family_module.eager_attention_forward
        )
        kwargs |= {"scaling": scores.scale, "softcap": scores.softcap}
        return attention(module, q, k, v, attention_mask, **kwargs)[0]

    def _windowed(
        self,
        heads: WindowHeads,
        projections: Projections,
        call: AttentionCall,
        cache: WindowCache | None,
        scores: Scores,
    ) -> Tensor:
        """Run heads that have a window, taking the layer's projections and scores: [B, T, heads, K]."""
        of_heads, hidden_states = self._projections_of(projections, heads.site.heads), call.hidden_states
        scores = self._scores_of(scores, heads.site.heads)
        padding_mask = None if call.padding_mask is None else call.padding_mask[:, -hidden_states.shape[1] :]
        packing = Packing.of(padding_mask)
        if packing is not None:
            padding_mask = packing.padding_mask
            of_heads, hidden_states = Projections(*map(packing.pack, of_heads)), packing.pack(hidden_states)
        output = self._of_packed(heads, of_heads, hidden_states, padding_mask, call.segments, cache, scores)
        return output if packing is None else packing.unpack(output)

    def _of_packed(
        self,
        heads: WindowHeads,
        projections: Projections,
        hidden_states: Tensor,
        padding_mask: Tensor | None,
        segments: Tensor | None,
        cache: WindowCache | None,
        scores: Scores,
    ) -> Tensor:
        """Run heads that have a window on their own projections, padding first: [B, T, heads, K]."""
        q, q_rotary, k, k_rotary, v = projections
        inputs = heads.recurrent_inputs(k, hidden_states)
        if cache is None:
            context = context_of(k_rotary, v, inputs, sinks=heads.sinks, padding_mask=padding_mask, segments=segments)
            return heads(q, q_rotary, context, scores=scores, state=None)[0]
        cached_context = heads.decode_context(
            cache.extend(k_rotary, v, heads.encode_inputs(inputs), padding_mask), inputs
        )
        output, cache.recurrent_state = heads(q, q_rotary, cached_context, scores=scores, state=cache.recurrent_state)
        return output

    def _new_caches(self) -> tuple[WindowCache | None, WindowCache | None]:
        """Return empty caches for the linear heads and for softmax heads with a window."""

        def new_cache(heads: WindowHeads | None) -> WindowCache | None:
            return None if heads is None else WindowCache(heads.window, heads.sinks, heads.delayed)

        return new_cache(self.mixer), new_cache(self.softmax_window_heads)

    def _projections_of(self, projections: Projections, key_value_heads: tuple[int, ...]) -> Projections:
        """Pick the given key/value heads, with the queries that read them, and put tokens first: [B, T, heads, K]."""
        return Projections(*(self._of_heads(x, key_value_heads).transpose(1, 2) for x in projections))

    def _scores_of(self, scores: Scores, key_value_heads: tuple[int, ...]) -> Scores:
        """Pick the learned sinks of the query heads that read the given key/value heads."""
        if scores.learned_sinks is None:
            return scores
        learned_sinks = self._of_heads(scores.learned_sinks[None, :, None], key_value_heads).flatten()
        return Scores(scores.scale, scores.softcap, learned_sinks)

    def _of_heads(self, x: Tensor, key_value_heads: tuple[int, ...]) -> Tensor:
        """Pick key/value heads of x, [B, heads, ...]; if x has query heads, pick the groups that read them."""
        total = len(self.softmax_heads) + len(self.linear_heads)
        if len(key_value_heads) == total:
            return x
        groups = x.split(x.shape[1] // total, dim=1)
        return torch.cat([groups[head] for head in key_value_heads], dim=1)
