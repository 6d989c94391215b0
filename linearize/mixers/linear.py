"""Linear attention without a gate.

    S_t = S_{t-1} + phi(k_t) v_t^T,  o_t = S_t^T phi(q_t) / sum_j phi(q_t) . phi(k_j)

Sources: Katharopoulos et al., arXiv 2006.16236, equations 8 to 12 (phi = elu + 1); SUPRA, arXiv 2405.06640, section 3
(`normalization: rms`, a norm on the output in place of the normaliser).
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.simple_gla import simple_gla

# largest exponent: the product of two exponentials, summed over a million tokens, fits into float32
LARGEST = 30.0
FEATURE_MAPS = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "exp": lambda x: x.clamp(max=LARGEST).exp(),
    "softmax": lambda x: x.softmax(-1),
    "identity": lambda x: x,
}
# `Mixer.log_unit` of each feature map
LOG_UNITS = {"elu": 10.7, "relu": 9.0, "exp": 17.7, "softmax": 1.1, "identity": 0.0}


class LinearAttention(Mixer):
    """S_t = S_{t-1} + phi(k_t) v_t^T,  o_t = S_t^T phi(q_t) / sum_j phi(q_t) . phi(k_j)

    No decay.

    Args:
        feature_map: phi: elu (elu + 1), relu, exp, softmax (over the channels) or identity.
        normalization: sum, rms or none.
    """

    def __init__(self, site: Site, feature_map: str = "elu", normalization: str = "sum"):
        super().__init__(site)
        self.phi = FEATURE_MAPS[feature_map]
        self.normalization = normalization
        self.log_unit = LOG_UNITS[feature_map]

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + outer(self.phi(k), v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, self.phi(q))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        (write,) = scan.mask_writes(self.phi(k))
        return simple_gla(self.phi(q), write, v, initial_state=scan.initial_state, segments=scan.segments)
