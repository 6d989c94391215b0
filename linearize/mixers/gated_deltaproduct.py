"""Gated DeltaProduct: several delta-rule steps per token, so that the transition is a product of Householder matrices.

    S_{t,0} = alpha_t S_{t-1},  S_{t,i} = (I - beta_{t,i} k_{t,i} k_{t,i}^T) S_{t,i-1} + beta_{t,i} k_{t,i} v_{t,i}^T
    S_t = S_{t,n},  o_t = S_t^T q_t

Source: DeltaProduct, arXiv 2502.10297, equation 5. The first step is Gated DeltaNet's, from the key projection alone.
Each further step has a key map and a value map per head, parameters: k_{t,i} is a rotation of k_t that starts random,
v_{t,i} starts at 0, so that the step begins as an erasure; its beta_{t,i} = sigmoid(p_t + c) starts small, c = -4.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.delta_rule import delta_rule

# a further step's beta starts at sigmoid(p - 4), about 0.02: next to no erasure
EXTRA_BIAS = -4.0


class GatedDeltaProduct(Mixer):
    """S_{t,0} = alpha_t S_{t-1},  S_{t,i} = (I - beta_{t,i} k_{t,i} k_{t,i}^T) S_{t,i-1} + beta_{t,i} k_{t,i} v_{t,i}^T

    One decay per head; `steps` keys, values and betas.

    Args:
        steps: n, the delta-rule steps per token; 2 in most of the paper.
        gate_logit_normalizer: divisor of the log-decay.
    """

    normalization = "rms"

    def __init__(self, site: Site, steps: int = 2, gate_logit_normalizer: float = 1.0):
        super().__init__(site)
        self.steps, self.gate_logit_normalizer = steps, gate_logit_normalizer
        J, K = len(site.heads), site.head_dim
        self.key_maps = nn.Parameter(torch.empty(steps - 1, J, K, K))
        self.value_maps = nn.Parameter(torch.empty(steps - 1, J, K, K))
        self.beta_bias = nn.Parameter(torch.empty(steps - 1, J, 1))

    def reset_parameters(self) -> None:
        generator = torch.Generator(device="cpu").manual_seed(0)
        shape = tuple(self.key_maps.shape)
        self.key_maps.copy_(torch.linalg.qr(torch.randn(shape, generator=generator, device="cpu")).Q)
        self.value_maps.zero_()
        self.beta_bias.fill_(EXTRA_BIAS)

    def _parts(self, k: Tensor, v: Tensor, beta_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys of length 1, values and betas of every step: [..., J, ·] -> [..., steps, J, ·]."""
        keys, values, logits = [k], [v], [beta_logits]
        for key_map, value_map, bias in zip(self.key_maps, self.value_maps, self.beta_bias):
            keys.append(torch.einsum("...k,...kf->...f", k, key_map.to(k.dtype)))
            # a column of ones behind the values counts weights and is not mapped
            mapped = torch.einsum("...k,...kf->...f", v[..., : k.shape[-1]], value_map.to(v.dtype))
            values.append(F.pad(mapped, (0, v.shape[-1] - mapped.shape[-1])))
            logits.append(beta_logits + bias.to(k.dtype))
        stacked = [torch.stack(parts, dim=-3) for parts in (keys, values, logits)]
        return F.normalize(stacked[0], dim=-1), stacked[1], stacked[2].sigmoid()

    def update(self, state: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, beta_logits: Tensor) -> Tensor:
        state = (-F.softplus(decay_logits) / self.gate_logit_normalizer).exp().unsqueeze(-1) * state
        for key, value, beta in zip(*(x.unbind(-3) for x in self._parts(k, v, beta_logits))):
            stored = (key.unsqueeze(-2) @ state).squeeze(-2)
            state = state + outer(beta * key, value - stored)
        return state

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, F.normalize(q, dim=-1))

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, beta_logits: Tensor, scan: Scan
    ) -> tuple[Tensor, Tensor]:
        log_decay = -F.softplus(decay_logits) / self.gate_logit_normalizer
        keys, values, betas = self._parts(k, v, beta_logits)
        # A token becomes `steps` tokens of the plain delta rule: the state decays at the first, the query reads after
        # the last. Tensors are [B, T, steps, heads, ·] until flattened to [B, T * steps, heads, ·].
        extra = self.steps - 1
        is_first = F.pad(torch.ones_like(decay_logits).unsqueeze(2), (0, 0, 0, 0, 0, extra))
        betas, log_decays = scan.mask_writes(betas, log_decay.unsqueeze(2) * is_first)
        queries = F.pad(F.normalize(q, dim=-1).unsqueeze(2), (0, 0, 0, 0, extra, 0))
        inputs = (x.flatten(1, 2) for x in (queries, keys, values, betas, log_decays))
        segments = None if scan.segments is None else scan.segments.repeat_interleave(self.steps, dim=1)
        output, state = delta_rule(*inputs, initial_state=scan.initial_state, segments=segments)
        return output[:, extra :: self.steps], state
