"""DeltaNet: a token replaces a share beta of the value that the state returns for its key.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    beta_t = sigmoid(p_t), twice that with negative eigenvalues,  p_t = mean of k_t,  q_t and k_t of length 1

Sources: DeltaNet, arXiv 2406.06484, equation 2; negative eigenvalues, arXiv 2411.12537, section 4.
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.delta_rule import delta_rule


class DeltaNet(Mixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t

    No decay.

    Args:
        negative_eigenvalues: let beta reach 2, so that a token can flip the sign of the value that it finds.
    """

    normalization = "rms"

    def __init__(self, site: Site, negative_eigenvalues: bool = False):
        super().__init__(site)
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        k, beta = F.normalize(k, dim=-1), self.largest_beta * logits.sigmoid()
        stored = (k.unsqueeze(-2) @ state).squeeze(-2)
        return state + outer(beta * k, v - stored)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, F.normalize(q, dim=-1))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        (beta,) = scan.mask_writes(self.largest_beta * logits.sigmoid())
        return delta_rule(q, k, v, beta, initial_state=scan.initial_state, segments=scan.segments)
