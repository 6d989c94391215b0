"""Mamba-2's recurrence with the key as gate: one decay per head.

    log_decay_t = -softplus(p_t),  S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t,  p_t = mean of k_t

With `learned_step` it has the step size of SSD: dt_t = softplus(p_t + b), log_decay_t = -exp(a) dt_t, and dt_t k_t
is written; a and b are parameters (one each per head) and start at 0.

Sources: Liger, arXiv 2503.01496, Table 1; SSD, arXiv 2405.21060, section 2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.simple_gla import simple_gla


class Mamba2(Mixer):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t

    One decay per head.

    Args:
        gate_logit_normalizer: divisor of the log-decay; 1 in Liger.
        learned_step: scale the written key by a step size with a learned rate and bias.
    """

    def __init__(self, site: Site, gate_logit_normalizer: float = 1.0, learned_step: bool = False):
        super().__init__(site)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.learned_step = learned_step
        if learned_step:
            self.log_rate = nn.Parameter(torch.empty(len(site.heads), 1))
            self.step_bias = nn.Parameter(torch.empty(len(site.heads), 1))

    def reset_parameters(self) -> None:
        if self.learned_step:
            self.log_rate.zero_()
            self.step_bias.zero_()

    def _step(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-decay and the factor of the written key, both [..., J, 1]."""
        if not self.learned_step:
            return -F.softplus(logits) / self.gate_logit_normalizer, torch.ones_like(logits)
        step = F.softplus(logits + self.step_bias)
        return -self.log_rate.exp() * step / self.gate_logit_normalizer, step

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        log_decay, step = self._step(logits)
        return log_decay.exp().unsqueeze(-1) * state + outer(step * k, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        log_decay, step = self._step(logits)
        write, log_decay = scan.mask_writes(step * k, log_decay)
        return simple_gla(q, write, v, log_decay.squeeze(-1), initial_state=scan.initial_state, segments=scan.segments)
