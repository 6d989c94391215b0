"""Magnitude-aware linear attention: the query's magnitude, which the normaliser cancels, counts again.

    s_tj = phi(q_t) . phi(k_j),  b_t = 1 + 1 / sum_j s_tj,  g_t = mean_j s_tj,  phi = elu + 1
    o_t = sum_j (b_t s_tj - g_t) v_j

whose weights sum to one though some are negative. Source: Rectifying Magnitude Neglect in Linear Attention, arXiv
2507.00698, equations 9 to 11, with sums over the past. The state is [K + 1, V + 1]: sums of phi(k) v^T, phi(k), v, 1.
"""

import torch
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, with_one
from linearize.ops.simple_gla import simple_gla

SMALLEST_SUM = 1e-6


class MagnitudeAwareLinearAttention(Mixer):
    """No decay."""

    def state_shape(self, value_dim):
        return (self.site.head_dim + 1, value_dim + 1)

    def update(self, state, k, v):
        return state + outer(with_one(F.elu(k) + 1), with_one(v))

    def read(self, before, after, q, k, v):
        return _rectified((F.elu(q) + 1) @ after[..., :-1, :], after[..., -1:, :])

    def chunked(self, q, k, v, scan: Scan):
        J = k.shape[2]
        (write,) = scan.mask_writes(with_one(F.elu(k) + 1))
        # one more query per group reads the plain sums
        queries = F.pad((F.elu(q) + 1).unflatten(2, (J, -1)), (0, 1))
        plain = F.pad(torch.zeros_like(queries[..., :1, :-1]), (0, 1), value=1.0)
        queries = torch.cat([queries, plain], dim=3).flatten(2, 3)
        sums, state = simple_gla(queries, write, with_one(v), initial_state=scan.initial_state, segments=scan.segments)
        sums = sums.unflatten(2, (J, -1))
        return _rectified(sums[..., :-1, :], sums[..., -1:, :]).flatten(2, 3), state


def _rectified(weighted, plain):
    """sum s v and sum s [..., G, V + 1], sum v and count [..., 1, V + 1] -> [..., G, V]."""
    total, count = weighted[..., -1:], plain[..., -1:].clamp(min=1.0)
    return (1 + 1 / total.clamp(min=SMALLEST_SUM)) * weighted[..., :-1] - total / count * plain[..., :-1]
