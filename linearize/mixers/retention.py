"""Gated retention: RetNet's recurrence with the decay read off the key.

    log_decay_t = logsigmoid(p_t) / 16,  p_t = mean of k_t
    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t

Sources: Liger, arXiv 2503.01496, Table 1; RetNet, arXiv 2307.08621, equation 6.
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.simple_gla import simple_gla


class GatedRetention(Mixer):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t

    One decay per head.

    Args:
        gate_logit_normalizer: divisor of the log-decay.
    """

    def __init__(self, site: Site, gate_logit_normalizer: float = 16.0):
        super().__init__(site)
        self.gate_logit_normalizer = gate_logit_normalizer

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        decay = (F.logsigmoid(logits) / self.gate_logit_normalizer).exp()
        return decay.unsqueeze(-1) * state + outer(k, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        write, log_decay = scan.mask_writes(k, F.logsigmoid(logits) / self.gate_logit_normalizer)
        return simple_gla(q, write, v, log_decay.squeeze(-1), initial_state=scan.initial_state, segments=scan.segments)
