"""HGRN2: what is not kept is written; the input gate is tied to the forget gate.

    f_t = gamma + (1 - gamma) sigmoid(p_t),  p_t = k_t
    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  o_t = S_t^T softmax(q_t)

Sources: Liger, arXiv 2503.01496, Table 1; HGRN2, arXiv 2404.07904, equation 3.
"""

import torch
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.gla import gla


class HGRN2(Mixer):
    """One tied gate per key channel.

    Args:
        lower_bound: gamma, below which no forget gate falls; at least 0, below 1.
    """

    def __init__(self, site, lower_bound: float = 0.0):
        super().__init__(site)
        self.lower_bound = lower_bound

    def update(self, state, k, v, logits):
        keep = self.lower_bound + (1 - self.lower_bound) * logits.sigmoid()
        return keep.unsqueeze(-1) * state + outer(1 - keep, v)

    def read(self, before, after, q, k, v):
        return read_state(after, q.softmax(-1))

    def chunked(self, q, k, v, logits, scan: Scan):
        if self.lower_bound:
            log_keep = torch.log(self.lower_bound + (1 - self.lower_bound) * logits.sigmoid())
        else:
            log_keep = F.logsigmoid(logits)
        write, log_keep = scan.mask_writes((1 - self.lower_bound) * (-logits).sigmoid(), log_keep)
        return gla(q.softmax(-1), write, v, log_keep, initial_state=scan.initial_state, segments=scan.segments)
