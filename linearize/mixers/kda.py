"""Kimi Delta Attention: the delta rule on a state that decays channel by channel.

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    alpha_t = sigmoid(p_t)^(1/16) per channel, p_t = k_t;  beta_t = sigmoid of its mean;  q_t and k_t of length 1

Source: Kimi Linear, arXiv 2510.26692, equation 1, with GLA's gate on the key projection.
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.delta_rule import delta_rule


class KimiDeltaAttention(Mixer):
    """S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t

    One decay per key channel, one beta per head.

    Args:
        gate_logit_normalizer: divisor of the log-decay.
    """

    normalization = "rms"

    def __init__(self, site: Site, gate_logit_normalizer: float = 16.0):
        super().__init__(site)
        self.gate_logit_normalizer = gate_logit_normalizer

    def update(self, state: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, beta_logits: Tensor) -> Tensor:
        k = F.normalize(k, dim=-1)
        state = (F.logsigmoid(decay_logits) / self.gate_logit_normalizer).exp().unsqueeze(-1) * state
        stored = (k.unsqueeze(-2) @ state).squeeze(-2)
        return state + outer(beta_logits.sigmoid() * k, v - stored)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, F.normalize(q, dim=-1))

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, beta_logits: Tensor, scan: Scan
    ) -> tuple[Tensor, Tensor]:
        log_decay = F.logsigmoid(decay_logits) / self.gate_logit_normalizer
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, log_decay = scan.mask_writes(beta_logits.sigmoid(), log_decay)
        return delta_rule(q, k, v, beta, log_decay, initial_state=scan.initial_state, segments=scan.segments)
