"""RetNet: a fixed decay per head, no gate.

    gamma_h = 1 - 2^(-5 - h),  S_t = gamma_h S_{t-1} + k_t v_t^T,  o_t = GroupNorm(S_t^T q_t)

with q and k after rotary. Source: RetNet, arXiv 2307.08621, equations 6 and 8. The h of a key/value head is spread
over 0 to 7, whatever the number of heads, as in the paper's models of eight.
"""

import math

import torch
from torch import Tensor

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.simple_gla import simple_gla


class Retention(Mixer):
    """S_t = gamma_h S_{t-1} + k_t v_t^T,  o_t = GroupNorm(S_t^T q_t), with one constant decay per head."""

    rotary = True
    normalization = "rms"

    def _log_decay(self, like: Tensor) -> Tensor:
        """Return log gamma_h, [J, 1], in the dtype and on the device of `like`."""
        spread = max(1, self.site.total_heads - 1)
        rates = [math.log1p(-(2.0 ** (-5 - 7 * head / spread))) for head in self.site.heads]
        return torch.tensor(rates, dtype=like.dtype, device=like.device)[:, None]

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._log_decay(k).exp().unsqueeze(-1) * state + outer(k, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        log_decay = self._log_decay(k).expand(*k.shape[:3], 1)
        write, log_decay = scan.mask_writes(k, log_decay)
        return simple_gla(q, write, v, log_decay.squeeze(-1), initial_state=scan.initial_state, segments=scan.segments)
