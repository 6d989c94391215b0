"""HGRN2: the input gate is tied to the forget gate, so that a channel writes as much as it forgets.

    f_t = gamma + (1 - gamma) sigmoid(p_t),  p_t = k_t
    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  o_t = S_t^T softmax(q_t)

Sources: Liger, arXiv 2503.01496, Table 1; HGRN2, arXiv 2404.07904, equation 3.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.gla import gla


class HGRN2(Mixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  o_t = S_t^T softmax(q_t)

    One tied gate per key channel.

    Args:
        lower_bound: gamma, the least value of a forget gate; at least 0, below 1.
    """

    def __init__(self, site: Site, lower_bound: float = 0.0):
        super().__init__(site)
        self.lower_bound = lower_bound

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        forget = self.lower_bound + (1 - self.lower_bound) * logits.sigmoid()
        return forget.unsqueeze(-1) * state + outer(1 - forget, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q.softmax(-1))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        if self.lower_bound:
            log_forget = torch.log(self.lower_bound + (1 - self.lower_bound) * logits.sigmoid())
        else:
            log_forget = F.logsigmoid(logits)
        write, log_forget = scan.mask_writes((1 - self.lower_bound) * (-logits).sigmoid(), log_forget)
        return gla(q.softmax(-1), write, v, log_forget, initial_state=scan.initial_state, segments=scan.segments)
