"""Gated DeltaNet: the delta rule on a state that decays, one decay per head.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    alpha_t = exp(-softplus(p_t)), beta_t = sigmoid(p_t),  p_t = mean of k_t,  q_t and k_t of length 1

Source: Gated DeltaNet, arXiv 2412.06464, equation 10.
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.delta_rule import delta_rule


class GatedDeltaNet(Mixer):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t

    One decay and one beta per head.

    Args:
        gate_logit_normalizer: divisor of the log-decay; 1 is Mamba-2's gate.
        negative_eigenvalues: let beta reach 2 (arXiv 2411.12537).
    """

    normalization = "rms"

    def __init__(self, site: Site, gate_logit_normalizer: float = 1.0, negative_eigenvalues: bool = False):
        super().__init__(site)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0

    def update(self, state: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, beta_logits: Tensor) -> Tensor:
        k, beta = F.normalize(k, dim=-1), self.largest_beta * beta_logits.sigmoid()
        state = (-F.softplus(decay_logits) / self.gate_logit_normalizer).exp().unsqueeze(-1) * state
        stored = (k.unsqueeze(-2) @ state).squeeze(-2)
        return state + outer(beta * k, v - stored)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, F.normalize(q, dim=-1))

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, beta_logits: Tensor, scan: Scan
    ) -> tuple[Tensor, Tensor]:
        log_decay = -F.softplus(decay_logits) / self.gate_logit_normalizer
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, log_decay = scan.mask_writes(self.largest_beta * beta_logits.sigmoid(), log_decay)
        return delta_rule(q, k, v, beta, log_decay, initial_state=scan.initial_state, segments=scan.segments)
