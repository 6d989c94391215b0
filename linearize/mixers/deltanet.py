"""DeltaNet: a token replaces what the state holds under its key, by the share beta.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    beta_t = sigmoid(p_t), twice that with negative eigenvalues,  p_t = mean of k_t,  q_t and k_t of length 1

Sources: DeltaNet, arXiv 2406.06484, equation 2; negative eigenvalues, arXiv 2411.12537, section 4.
"""

from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.delta_rule import delta_rule


class DeltaNet(Mixer):
    """No decay.

    Args:
        negative_eigenvalues: lets beta reach 2, so that a token can flip the sign of what it finds.
    """

    normalization = "rms"

    def __init__(self, site, negative_eigenvalues: bool = False):
        super().__init__(site)
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0

    def update(self, state, k, v, logits):
        k, beta = F.normalize(k, dim=-1), self.largest_beta * logits.sigmoid()
        held = (k.unsqueeze(-2) @ state).squeeze(-2)
        return state + outer(beta * k, v - held)

    def read(self, before, after, q, k, v):
        return read_state(after, F.normalize(q, dim=-1))

    def chunked(self, q, k, v, logits, scan: Scan):
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        (beta,) = scan.mask_writes(self.largest_beta * logits.sigmoid())
        return delta_rule(q, k, v, beta, initial_state=scan.initial_state, segments=scan.segments)
