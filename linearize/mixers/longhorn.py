"""Longhorn: the decay follows from solving a small online regression exactly.

    d_t = b_t / (1 + b_t k_t . k_t),  b_t = sigmoid(p_t),  p_t = mean of k_t
    S_t = diag(1 - d_t k_t^2) S_{t-1} + d_t k_t v_t^T,  o_t = S_t^T q_t

Source: Longhorn, arXiv 2407.14207, equations 7 and 8 (the diagonal approximation), with one b_t per head.
"""

import torch
from torch import Tensor

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.gla import gla


class Longhorn(Mixer):
    """S_t = diag(1 - d_t k_t^2) S_{t-1} + d_t k_t v_t^T,  o_t = S_t^T q_t

    One decay per key channel. The only gate is the write strength b_t.
    """

    def _step(self, k: Tensor, logits: Tensor) -> Tensor:
        """Return the step size d_t, [..., J, 1]."""
        strength = logits.sigmoid()
        return strength / (1 + strength * k.square().sum(-1, keepdim=True))

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        step = self._step(k, logits)
        return (1 - step * k.square()).unsqueeze(-1) * state + outer(step * k, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        strength, square = logits.sigmoid(), k.square()
        # 1 - d k^2 = (1 + b (|k|^2 - k^2)) / (1 + b |k|^2), which no rounding makes zero
        total = square.sum(-1, keepdim=True)
        log_decay = torch.log1p(strength * (total - square).clamp(min=0.0)) - torch.log1p(strength * total)
        write, log_decay = scan.mask_writes(self._step(k, logits) * k, log_decay)
        return gla(q, write, v, log_decay, initial_state=scan.initial_state, segments=scan.segments)
