"""Hedgehog: feature maps learned to mimic softmax, as used by LoLCATs.

    phi(x) = [softmax(W x), softmax(-W x)],  S_t = S_{t-1} + phi_k(k_t) v_t^T,
    o_t = S_t^T phi_q(q_t) / sum_j phi_q(q_t) . phi_k(k_j)

with q and k after rotary and one W per head, for queries and for keys, that starts as the identity. Sources: Hedgehog,
arXiv 2402.04347, equation 6; LoLCATs, arXiv 2410.10254, section 3.1, whose normaliser is shared with the window
(`mix: joint`).
"""

import torch
from torch import Tensor, nn

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.simple_gla import simple_gla


class Hedgehog(Mixer):
    """S_t = S_{t-1} + phi_k(k_t) v_t^T,  o_t = S_t^T phi_q(q_t) / sum_j phi_q(q_t) . phi_k(k_j)

    No decay. The state is [2 K, V].
    """

    rotary = True
    normalization = "sum"
    log_unit = 1.6

    def __init__(self, site: Site):
        super().__init__(site)
        J, K = len(site.heads), site.head_dim
        self.query_map = nn.Parameter(torch.empty(J * site.group, K, K))
        self.key_map = nn.Parameter(torch.empty(J, K, K))

    def reset_parameters(self) -> None:
        for maps in (self.query_map, self.key_map):
            maps.copy_(torch.eye(self.site.head_dim, device=maps.device).expand_as(maps))

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (2 * self.site.head_dim, value_dim)

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + outer(_hedgehog(k, self.key_map), v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = self.query_map.unflatten(0, (len(self.site.heads), -1))
        return read_state(after, _hedgehog(q, maps))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        (write,) = scan.mask_writes(_hedgehog(k, self.key_map))
        return simple_gla(
            _hedgehog(q, self.query_map), write, v, initial_state=scan.initial_state, segments=scan.segments
        )


def _hedgehog(x: Tensor, maps: Tensor) -> Tensor:
    """Return phi(x) = [softmax(W x), softmax(-W x)]: [..., heads, K] under [heads, K, K] -> [..., heads, 2 K]."""
    mapped = torch.einsum("...k,...kf->...f", x, maps.to(x.dtype))
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)
