"""Magnitude-aware linear attention: the query's magnitude, which the normaliser cancels, counts again.

    s_tj = phi(q_t) . phi(k_j),  b_t = 1 + 1 / sum_j s_tj,  g_t = mean_j s_tj,  phi = elu + 1
    o_t = sum_j (b_t s_tj - g_t) v_j

whose weights sum to one though some are negative. Source: Rectifying Magnitude Neglect in Linear Attention, arXiv
2507.00698, equations 9 to 11, with sums over the past. The state is [K + 1, V + 1]: sums of phi(k) v^T, phi(k), v, 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, with_one
from linearize.ops.simple_gla import simple_gla

# a smaller sum of weights counts as this, so that its inverse stays finite
SMALLEST_SUM = 1e-6


class MagnitudeAwareLinearAttention(Mixer):
    """o_t = sum_j (b_t s_tj - g_t) v_j,  s_tj = phi(q_t) . phi(k_j)

    No decay. The state is [K + 1, V + 1].
    """

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (self.site.head_dim + 1, value_dim + 1)

    def update(self, state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + outer(with_one(F.elu(k) + 1), with_one(v))

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _rectified((F.elu(q) + 1) @ after[..., :-1, :], after[..., -1:, :])

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        J = k.shape[2]
        (write,) = scan.mask_writes(with_one(F.elu(k) + 1))
        # one more query per group reads the plain sums
        queries = F.pad((F.elu(q) + 1).unflatten(2, (J, -1)), (0, 1))
        plain = F.pad(torch.zeros_like(queries[..., :1, :-1]), (0, 1), value=1.0)
        queries = torch.cat([queries, plain], dim=3).flatten(2, 3)
        sums, state = simple_gla(queries, write, with_one(v), initial_state=scan.initial_state, segments=scan.segments)
        sums = sums.unflatten(2, (J, -1))
        return _rectified(sums[..., :-1, :], sums[..., -1:, :]).flatten(2, 3), state


def _rectified(weighted: Tensor, plain: Tensor) -> Tensor:
    """Return b sum_j s_j v_j - g sum_j v_j, [..., G, V].

    Args:
        weighted: sum_j s_j v_j and, in the last column, sum_j s_j: [..., G, V + 1].
        plain: sum_j v_j and, in the last column, the number of tokens: [..., 1, V + 1].
    """
    total, count = weighted[..., -1:], plain[..., -1:].clamp(min=1.0)
    return (1 + 1 / total.clamp(min=SMALLEST_SUM)) * weighted[..., :-1] - total / count * plain[..., :-1]
