"""RWKV-6 (Finch): a query reads the state before its own token, which counts through a bonus instead.

    w_t = exp(-exp(p_t)),  p_t = k_t
    o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t,  S_t = diag(w_t) S_{t-1} + k_t v_t^T

Sources: Liger, arXiv 2503.01496, Table 1; Finch, arXiv 2404.05892, equations 16 to 19. The bonus u is the only
parameter; it starts at 1.
"""

import torch
from torch import Tensor, nn

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.gla import gla

# exp(-exp(4)) is 2e-24, a decay of nearly zero; exp(p) of a larger p would overflow
LARGEST_LOGIT = 4.0


class RWKV6(Mixer):
    """o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t,  S_t = diag(w_t) S_{t-1} + k_t v_t^T

    One decay per key channel, doubly exponential.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        self.bonus = nn.Parameter(torch.empty(len(site.heads), site.head_dim))

    def reset_parameters(self) -> None:
        self.bonus.fill_(1.0)

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        return (-logits.clamp(max=LARGEST_LOGIT).exp()).exp().unsqueeze(-1) * state + outer(k, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(before + outer(self.bonus * k, v), q)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        write, log_decay = scan.mask_writes(k, -logits.clamp(max=LARGEST_LOGIT).exp())
        # a query reads the state before its own token: the same recurrence, one token late
        late_write, late_v, late_decay = (_late(x) for x in (write, v, log_decay))
        if scan.segments is not None:
            first = torch.zeros_like(scan.segments, dtype=torch.bool)
            first[:, 1:] = scan.segments[:, 1:] != scan.segments[:, :-1]
            late_write = late_write.masked_fill(first[..., None, None], 0.0)
        output, state = gla(q, late_write, late_v, late_decay, initial_state=scan.initial_state, segments=scan.segments)
        group = q.unflatten(2, (k.shape[2], -1))
        current = (group * (self.bonus * write).unsqueeze(3)).sum(-1, keepdim=True) * v.unsqueeze(3)
        state = log_decay[:, -1].exp().unsqueeze(-1) * state + outer(write[:, -1], v[:, -1])
        return output + current.flatten(2, 3), state


def _late(x: Tensor) -> Tensor:
    """Shift [B, T, ...] by one token; the first gets zeros."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
