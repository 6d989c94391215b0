"""Based: the second-order Taylor series of softmax's exponential as feature map, on a few learned dimensions.

    phi(x) = [1, x, vec(x x^T) / sqrt(2)],  so that  phi(q') . phi(k') = 1 + q'k' + (q'k')^2 / 2
    S_t = S_{t-1} + phi(k'_t) v_t^T,  o_t = S_t^T phi(q'_t) / sum_j phi(q'_t) . phi(k'_j)

with q' = W_q q / d^(1/4), k' = W_k k / d^(1/4) of d dimensions. Source: Based, arXiv 2402.18668, equation 4. The maps
start as the same random orthonormal columns for queries and keys.
"""

import math

import torch
from torch import Tensor, nn

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.simple_gla import simple_gla


class Based(Mixer):
    """S_t = S_{t-1} + phi(k'_t) v_t^T,  o_t = S_t^T phi(q'_t) / sum_j phi(q'_t) . phi(k'_j)

    No decay. The state is [1 + d + d^2, V].

    Args:
        features: d, the dimensions of q' and k'; 16 in the paper.
    """

    normalization = "sum"
    log_unit = 8.4

    def __init__(self, site: Site, features: int = 16):
        super().__init__(site)
        self.features = features
        self.query_map = nn.Parameter(torch.empty(len(site.heads) * site.group, site.head_dim, features))
        self.key_map = nn.Parameter(torch.empty(len(site.heads), site.head_dim, features))

    def reset_parameters(self) -> None:
        generator = torch.Generator(device="cpu").manual_seed(0)
        size = max(self.site.head_dim, self.features)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, device="cpu")).Q
        for maps in (self.query_map, self.key_map):
            maps.copy_(basis[: self.site.head_dim, : self.features].expand_as(maps))

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (1 + self.features + self.features**2, value_dim)

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + outer(self._taylor(k, self.key_map), v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, self._taylor(q, self.query_map.unflatten(0, (len(self.site.heads), -1))))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        (write,) = scan.mask_writes(self._taylor(k, self.key_map))
        return simple_gla(
            self._taylor(q, self.query_map), write, v, initial_state=scan.initial_state, segments=scan.segments
        )

    def _taylor(self, x: Tensor, maps: Tensor) -> Tensor:
        """Return phi(x maps): [..., heads, K] under [heads, K, d] -> [..., heads, 1 + d + d^2]."""
        x = torch.einsum("...k,...kf->...f", x, maps.to(x.dtype)) / self.features**0.25
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square], dim=-1)
