"""NormAttention: linear attention with a norm on the output instead of the normaliser, whose gradients explode.

    S_t = S_{t-1} + phi(k_t) v_t^T,  o_t = RMSNorm(S_t^T phi(q_t)),  phi = elu + 1

Source: The Devil in Linear Transformer, arXiv 2210.10340, equation 11.
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.simple_gla import simple_gla


class NormAttention(Mixer):
    """S_t = S_{t-1} + phi(k_t) v_t^T,  o_t = RMSNorm(S_t^T phi(q_t)), with no decay and no normaliser."""

    normalization = "rms"

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + outer(F.elu(k) + 1, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, F.elu(q) + 1)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        (write,) = scan.mask_writes(F.elu(k) + 1)
        return simple_gla(F.elu(q) + 1, write, v, initial_state=scan.initial_state, segments=scan.segments)
