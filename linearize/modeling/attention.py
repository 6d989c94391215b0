"""The attention of a linearized layer, laid over the family's own attention class.

The family keeps projections, biases, norms, rotary and output projection. This class calls the family's forward
with the cache taken away and with rotary set to the identity, so that q, k and v arrive at `attend` as the
projections left them; rotary is then applied with the family's own function.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.families.family import Family
from linearize.mixers.mixer import Site
from linearize.modeling.branch import WindowHeads, build_linear_heads, build_softmax_window_heads
from linearize.modeling.cache import WindowCache, adopt_layer, context_of
from linearize.ops.window import Scores
from linearize.plan import LayerPlan

IMPLEMENTATION = "linearize"
# what transformers up to 5.23, from 5.24 on, and GPT-NeoX call the cache
CACHE_ARGUMENTS = ("past_key_values", "cache", "layer_past")


@dataclass
class AttentionCall:
    """What `attend` needs besides q, k and v, handed through the family's forward as one extra keyword."""

    cache: Cache | None
    position_embeddings: tuple[Tensor, Tensor]
    padding_mask: Tensor | None
    segments: Tensor | None
    hidden_states: Tensor


@dataclass
class KeptHeads:
    """What an attention function reads from its module, for the heads of a layer that keep softmax."""

    sinks: Tensor
    num_key_value_groups: int
    training: bool
    layer_idx: int
    config: object
    is_causal: bool = True


@dataclass
class Observation:
    """What an observer sees of one layer while the model runs as its base (`LinearizedAttention.observer`).

    Attributes:
        branch: the layer's linear heads.
        q, q_rotary, k, k_rotary, v: their queries [B, T, H, K], keys and values [B, T, J, K].
        hidden_states: [B, T, D], what the layer's projections read.
        target: the base model's attention output of the same heads, [B, T, H, K].
        run: computes their own output, [B, T, H, K].
    """

    layer: int
    branch: WindowHeads
    q: Tensor
    q_rotary: Tensor
    k: Tensor
    k_rotary: Tensor
    v: Tensor
    hidden_states: Tensor
    target: Tensor
    scores: Scores
    run: Callable[[], Tensor]


def _attend(module, query, key, value, attention_mask, *, linearize_call: AttentionCall, **kwargs):
    return module.attend(query, key, value, attention_mask, linearize_call, **kwargs), None


AttentionInterface.register(IMPLEMENTATION, _attend)


class LinearizedAttention:
    """Mixed in before the family's attention class by the factory. Some key/value heads keep softmax, the rest are
    linear; see `LinearHeads`. In softmax mode (`linear = False`) the class is the family's own. With an `observer` all
    heads keep softmax too, and the observer is shown what the linear heads would have had to do. What it returns, if
    anything, takes the place of their output.
    """

    observer: Callable[[Observation], Tensor | None] | None = None

    def setup(self, plan: LayerPlan, site: Site, config, family: Family, *, rotates: bool) -> None:
        """Turns an instance of the family's class into this one, in place.

        Args:
            site: of the linear heads.
            config: the copy of the model's config that routes this layer's attention to `attend`.
            rotates: whether this layer rotates queries and keys.
        """
        self.softmax_config, self.linear_config = self.config, config
        self.softmax_heads, self.linear_heads = plan.softmax_heads, site.heads
        self.query_group = site.group
        self.partial_rotary, self.rotates = family.partial_rotary, rotates
        base = next(base for base in type(self).__mro__ if base.__module__.startswith("transformers.models"))
        self.family_module_name = base.__module__  # a module itself could be neither copied nor pickled
        self.call_names = [name for name in inspect.signature(base.forward).parameters if name != "self"]
        self.cache_name = next(name for name in CACHE_ARGUMENTS if name in self.call_names)
        self.handed_on: dict[str, Tensor | None] = {}
        self.mixer = build_linear_heads(plan, site, config.hidden_size) if site.heads else None
        self.kept = build_softmax_window_heads(plan, site)
        order = [*self.softmax_heads, *self.linear_heads]
        self.places = [order.index(head) for head in range(site.total_heads)]
        self.set_linear(True)

    @property
    def family_module(self):
        """The family's modelling module, for its own rotary and its eager attention."""
        return sys.modules[self.family_module_name]

    def set_linear(self, linear: bool) -> None:
        """Switches between the linearized layer and the family's softmax attention on the same weights."""
        self.linear = linear
        self.config = self.linear_config if linear else self.softmax_config

    def forward(self, *args, **kwargs):
        if not self.linear:
            return super().forward(*args, **kwargs)
        kwargs |= self.handed_on
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
        **kwargs,
    ) -> Tensor:
        """q [B, H, T, K], k and v [B, J, T, K], before rotary; returns [B, T, H, K].

        Args:
            softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
            s_aux: [H], a learned score in every head's normaliser that no value belongs to (gpt-oss).
        """
        assert k.shape[2] == q.shape[2], "the family's forward met a cache that should have been taken away"
        assert k.shape[1] == len(self.softmax_heads) + len(self.linear_heads), "the config counts other heads"
        q_rotary, k_rotary = self._rotate(q, k, *call.position_embeddings)
        if self.observer is not None:
            options = {"scaling": scaling, "softcap": softcap, **kwargs}
            return self._observed(q, q_rotary, k, k_rotary, v, attention_mask, call, s_aux, **options)
        layer = None
        if call.cache is not None:
            layer = adopt_layer(call.cache, self.layer_idx, self._new_caches)
            layer.advance(k, v)
        outputs = []
        if self.softmax_heads and self.kept is None:
            picked = [self._heads(x, self.softmax_heads) for x in (q_rotary, k_rotary, v)]
            options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, **kwargs}
            learned = self._of_heads(s_aux, self.softmax_heads)
            outputs.append(self._softmax(*picked, attention_mask, layer, learned, **options))
        for heads, cache in (
            (self.kept, None if layer is None else layer.kept),
            (self.mixer, None if layer is None else layer.linear),
        ):
            if heads is not None:
                # [B, T, heads, K] from here on
                chosen = heads.site.heads
                picked = [self._heads(x, chosen).transpose(1, 2) for x in (q, q_rotary, k, k_rotary, v)]
                scores = Scores(scaling, softcap, self._of_heads(s_aux, chosen))
                outputs.append(self._windowed(heads, *picked, call, cache, scores))
        if len(outputs) == 1:
            return outputs[0]
        groups = [group for output in outputs for group in output.split(self.query_group, dim=2)]
        return torch.cat([groups[place] for place in self.places], dim=2)

    def _observed(
        self, q, q_rotary, k, k_rotary, v, attention_mask, call, s_aux, *, scaling, softcap, **kwargs
    ) -> Tensor:
        options = {"scaling": scaling, "softcap": softcap, **kwargs}
        output = self._softmax(q_rotary, k_rotary, v, attention_mask, None, s_aux, **options)
        if self.linear_heads:
            picked = [self._heads(x, self.linear_heads).transpose(1, 2) for x in (q, q_rotary, k, k_rotary, v)]
            scores = Scores(scaling, softcap, self._of_heads(s_aux, self.linear_heads))
            seen = self.observer(
                Observation(
                    self.layer_idx,
                    self.mixer,
                    *picked,
                    hidden_states=call.hidden_states,
                    target=self._heads(output.transpose(1, 2), self.linear_heads).transpose(1, 2),
                    scores=scores,
                    run=lambda: self._windowed(self.mixer, *picked, call, None, scores),
                )
            )
            if seen is not None:
                output = output.unflatten(2, (-1, self.query_group)).clone()
                output[:, :, list(self.linear_heads)] = seen.unflatten(2, (-1, self.query_group)).to(output.dtype)
                output = output.flatten(2, 3)
        return output

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary as the family applies it in this layer."""
        if not self.rotates:
            return q, k
        rotate = self.family_module.apply_rotary_pos_emb
        if not self.partial_rotary:
            return rotate(q, k, cos, sin)
        width = cos.shape[-1]
        rotated = rotate(q[..., :width], k[..., :width], cos, sin)
        return tuple(torch.cat([part, x[..., width:]], dim=-1) for part, x in zip(rotated, (q, k)))

    def _softmax(self, q, k, v, attention_mask, layer, s_aux: Tensor | None, **kwargs) -> Tensor:
        if layer is not None:
            k, v = layer.extend_softmax(k, v)
        module = self
        if s_aux is not None:  # an eager implementation reads all heads' learned sinks from its module
            kwargs["s_aux"] = s_aux
            module = KeptHeads(s_aux, self.query_group, self.training, self.layer_idx, self.softmax_config)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.softmax_config._attn_implementation, self.family_module.eager_attention_forward
        )
        return interface(module, q, k, v, attention_mask, **kwargs)[0]

    def _windowed(
        self, heads: WindowHeads, q, q_rotary, k, k_rotary, v, call: AttentionCall, cache: WindowCache | None, scores
    ) -> Tensor:
        padding_mask = None if call.padding_mask is None else call.padding_mask[:, -q.shape[1] :]
        inputs = heads.recurrent_inputs(k, call.hidden_states)
        if cache is None:
            context = context_of(
                k_rotary, v, inputs, sinks=heads.sinks, padding_mask=padding_mask, segments=call.segments
            )
            return heads(q, q_rotary, context, scores=scores, state=None)[0]
        context = heads.decoded(cache.extend(k_rotary, v, heads.encoded(inputs), padding_mask), inputs)
        output, cache.recurrent_state = heads(q, q_rotary, context, scores=scores, state=cache.recurrent_state)
        return output

    def _new_caches(self) -> list[WindowCache | None]:
        """Empty caches of the linear heads, and of the softmax heads where these have a window."""
        return [
            None if heads is None else WindowCache(heads.window, heads.sinks, heads.delayed)
            for heads in (self.mixer, self.kept)
        ]

    def _of_heads(self, x: Tensor | None, key_value_heads: tuple[int, ...]) -> Tensor | None:
        """The entries of x, [H], that belong to the given key/value heads."""
        return None if x is None else self._heads(x[None, :, None], key_value_heads).flatten()

    def _heads(self, x: Tensor, key_value_heads: tuple[int, ...]) -> Tensor:
        """The given key/value heads of x, [B, heads, T, K], or for queries their groups."""
        if len(key_value_heads) == len(self.softmax_heads) + len(self.linear_heads):
            return x
        groups = x.split(x.shape[1] // (len(self.softmax_heads) + len(self.linear_heads)), dim=1)
        return torch.cat([groups[head] for head in key_value_heads], dim=1)
