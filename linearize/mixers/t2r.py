"""T2R: a one-layer perceptron as feature map.

    phi(x) = relu(W x + b),  S_t = S_{t-1} + phi_k(k_t) v_t^T,  o_t = S_t^T phi_q(q_t) / sum_j phi_q(q_t) . phi_k(k_j)

Source: Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076, equation 5. One map per head for queries and
for keys; W starts as random orthonormal columns, b at 0.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.simple_gla import simple_gla


class T2R(Mixer):
    """S_t = S_{t-1} + phi_k(k_t) v_t^T,  o_t = S_t^T phi_q(q_t) / sum_j phi_q(q_t) . phi_k(k_j)

    No decay. The state is [features, V].

    Args:
        features: size of the feature map; 32 in the paper.
    """

    normalization = "sum"
    log_unit = 8.9

    def __init__(self, site: Site, features: int = 32):
        super().__init__(site)
        self.features = features
        H, J = len(site.heads) * site.group, len(site.heads)
        self.query_map = nn.Parameter(torch.empty(H, site.head_dim, features))
        self.query_bias = nn.Parameter(torch.empty(H, features))
        self.key_map = nn.Parameter(torch.empty(J, site.head_dim, features))
        self.key_bias = nn.Parameter(torch.empty(J, features))

    def reset_parameters(self) -> None:
        K = self.site.head_dim
        generator = torch.Generator(device="cpu").manual_seed(0)
        # queries and keys start with the same map, so that similar ones keep a large product
        basis = torch.randn(max(K, self.features), max(K, self.features), generator=generator, device="cpu")
        start = torch.linalg.qr(basis).Q[:K, : self.features]
        for maps, bias in ((self.query_map, self.query_bias), (self.key_map, self.key_bias)):
            maps.copy_(start.expand_as(maps))
            bias.zero_()

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (self.features, value_dim)

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + outer(_relu_features(k, self.key_map, self.key_bias), v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps, bias = (x.unflatten(0, (len(self.site.heads), -1)) for x in (self.query_map, self.query_bias))
        return read_state(after, _relu_features(q, maps, bias))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        (write,) = scan.mask_writes(_relu_features(k, self.key_map, self.key_bias))
        read = _relu_features(q, self.query_map, self.query_bias)
        return simple_gla(read, write, v, initial_state=scan.initial_state, segments=scan.segments)


def _relu_features(x: Tensor, maps: Tensor, bias: Tensor) -> Tensor:
    """Return relu(W x + b): [..., heads, K] under [heads, K, F] and [heads, F] -> [..., heads, F]."""
    return F.relu(torch.einsum("...k,...kf->...f", x, maps.to(x.dtype)) + bias.to(x.dtype))
