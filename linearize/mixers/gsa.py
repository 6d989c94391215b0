"""Gated slot attention: a fixed number of slots for keys and values, read by softmax.

    alpha_t = sigmoid(p_t)^(1/16), s_t = 1 - alpha_t,  p_t = k_t (one slot per key channel)
    K_t = diag(alpha_t) K_{t-1} + s_t k_t^T,  V_t = diag(alpha_t) V_{t-1} + s_t v_t^T
    o_t = V_t^T softmax(K_t q_t)

Sources: Liger, arXiv 2503.01496, Table 1; GSA, arXiv 2409.07146, equation 6. The state is [M, K + V]: both memories.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.gsa import gsa


class GatedSlotAttention(Mixer):
    """K_t = diag(alpha_t) K_{t-1} + s_t k_t^T,  V_t = diag(alpha_t) V_{t-1} + s_t v_t^T,  o_t = V_t^T softmax(K_t q_t)

    As many slots as the head has channels.

    Args:
        gate_logit_normalizer: divisor of the log-decay.
    """

    def __init__(self, site: Site, gate_logit_normalizer: float = 16.0):
        super().__init__(site)
        self.gate_logit_normalizer = gate_logit_normalizer

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (self.site.head_dim, self.site.head_dim + value_dim)

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        decay = (F.logsigmoid(logits) / self.gate_logit_normalizer).exp()
        return decay.unsqueeze(-1) * state + outer(1 - decay, torch.cat([k, v], dim=-1))

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = after.split([self.site.head_dim, v.shape[-1]], dim=-1)
        return read_state(values, (q @ keys.transpose(-1, -2)).softmax(-1))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        log_decay = F.logsigmoid(logits) / self.gate_logit_normalizer
        slots, log_decay = scan.mask_writes(-torch.expm1(log_decay), log_decay)
        return gsa(q, k, v, slots, log_decay, initial_state=scan.initial_state, segments=scan.segments)
