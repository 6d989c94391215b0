"""Lightning attention: a fixed decay per head, slower in later layers.

    log lambda_h = -2^(-8 (h + 1) / heads) (1 - layer / layers),  S_t = lambda_h S_{t-1} + silu(k_t) v_t^T,
    o_t = RMSNorm(S_t^T silu(q_t))

Source: Lightning Attention-2, arXiv 2401.04658, equation 6, with the slopes (ALiBi's, scaled by layer) and the
activation of MiniMax-01's released code (arXiv 2501.08313, section 2.2). The last layer still decays.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.simple_gla import simple_gla


class LightningAttention(Mixer):
    """S_t = lambda_h S_{t-1} + silu(k_t) v_t^T,  o_t = RMSNorm(S_t^T silu(q_t))

    One constant decay per head and layer.
    """

    normalization = "rms"

    def _log_decay(self, like: Tensor) -> Tensor:
        """Return log lambda_h, [J, 1], in the dtype and on the device of `like`."""
        depth = 1 - self.site.layer / self.site.layers
        rates = [-depth * 2.0 ** (-8 * (head + 1) / self.site.total_heads) for head in self.site.heads]
        return torch.tensor(rates, dtype=like.dtype, device=like.device)[:, None]

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._log_decay(k).exp().unsqueeze(-1) * state + outer(F.silu(k), v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, F.silu(q))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        log_decay = self._log_decay(k).expand(*k.shape[:3], 1)
        write, log_decay = scan.mask_writes(F.silu(k), log_decay)
        return simple_gla(
            F.silu(q), write, v, log_decay.squeeze(-1), initial_state=scan.initial_state, segments=scan.segments
        )
