"""Vector-quantised attention: past keys are kept as the means of a few clusters, and softmax attends to the means.

    s_t = softmax(A k_t + a)                                       k before rotary: clusters know no positions
    N_t = N_{t-1} + s_t,  M_t = M_{t-1} + s_t k~_t^T,  S_t = S_{t-1} + s_t v_t^T         k~ after rotary
    o_t = sum_c w_c S_{t,c} / sum_c w_c N_{t,c},  w_c = exp(scale q~_t . M_{t,c} / N_{t,c})

Source: Transformer-VQ, arXiv 2309.16354, theorem 3.7, with two changes. The codes that stand for past keys are the running
means of what was assigned to them, so they carry the positions they were read at (the two passes of gated slot attention,
arXiv 2409.07146). And the assignment is a sharp softmax in fifteenths, so that gradients reach it and a cache keeps half a
byte for each. With `mix: joint` the w share the window's normaliser in the base model's own unit; their sum is handed on as
its logarithm, so that what is common to all scores changes nothing, as in softmax. `fit` finds the clusters.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.errors import ConfigError
from linearize.mixers.mixer import NEVER, Mixer, Scan, outer
from linearize.ops.chunks import state_dtype
from linearize.ops.simple_gla import simple_gla

SHARPNESS = 8.0
# an assignment of 0 to 1 in steps, two of them in a byte
STEPS = 15
ITERATIONS = 10
# no token was assigned to a cluster with less: half a step
LEAST_COUNT = 0.5 / STEPS


class VectorQuantized(Mixer):
    """No decay; the state is [codes, K + 1 + V]: key sums, counts, value sums. Every query head learns its own scale."""

    rotary = True
    normalization = "sum"
    log_normaliser = True
    assigns = True
    starts_unfitted = True

    def __init__(self, site, codes: int = 16):
        super().__init__(site)
        if codes % 2:
            raise ConfigError(f"mixer_options.codes: got {codes}, which is odd; an even number is needed")
        J, K = len(site.heads), site.head_dim
        self.codes = codes
        self.key_codes = nn.Parameter(torch.empty(J, codes, K))
        self.key_bias = nn.Parameter(torch.empty(J, codes))
        self.log_scale = nn.Parameter(torch.empty(J * site.group))

    def reset_parameters(self):
        """Random directions, the same everywhere; `fit` finds better ones."""
        codes = torch.randn(self.key_codes.shape, generator=torch.Generator().manual_seed(self.site.layer))
        self.key_codes.copy_(codes)
        self.key_bias.copy_(-0.5 * codes.square().sum(-1))
        self.log_scale.fill_(-0.5 * math.log(self.site.head_dim))

    @torch.no_grad()
    def fit(self, q, q_rotary, k, scale):
        """k-means over keys, where the distance of two is the mean square difference of their scores.

        Queries are turned by what rotary does to them on average over the positions seen: what turns fast cancels, and
        does not count in the distance. In float64 and rounded, so that every run comes to the same parameters.
        """
        group = self.site.group
        for j in range(len(self.site.heads)):
            raw, turned = (x[:, j * group : (j + 1) * group].flatten(0, 1).cpu().double() for x in (q, q_rotary))
            turn = torch.linalg.lstsq(raw, turned).solution
            expected = scale * raw @ turn
            moment = expected.T @ expected / expected.shape[0]
            moment.diagonal().add_(1e-4 * moment.diagonal().mean() + 1e-12)
            metric = turn @ torch.linalg.cholesky(moment)
            codes = _k_means(k[:, j].cpu().double() @ metric, self.codes)
            self.key_codes[j] = _rounded(SHARPNESS * codes @ metric.T)
            self.key_bias[j] = _rounded(-0.5 * SHARPNESS * codes.square().sum(-1))
        self.log_scale.fill_(math.log(scale))

    def state_shape(self, value_dim):
        return (self.codes, self.site.head_dim + 1 + value_dim)

    def assign(self, k):
        k, codes, bias = (x.to(state_dtype(k)) for x in (k, self.key_codes, self.key_bias))
        s = (torch.einsum("...k,...ck->...c", k, codes) + bias).softmax(-1)
        rounded = (s * STEPS).round() / STEPS
        # gradients pass the rounding as if it were not there
        return s + (rounded - s).detach() if s.requires_grad else rounded

    def assignment_bytes(self):
        return self.codes // 2

    def encode_assignment(self, assignment):
        low, high = (assignment * STEPS).round().to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return low | (high << 4)

    def decode_assignment(self, encoded, dtype):
        return torch.stack([encoded & 15, encoded >> 4], dim=-1).flatten(-2).to(dtype) / STEPS

    def update_inputs(self, k, gate_offset, assignment):
        return [self.assign(k) if assignment is None else assignment]

    def update(self, state, k, v, s):
        return state + outer(s, torch.cat([k, torch.ones_like(k[..., :1]), v], dim=-1))

    def read(self, before, after, q, k, v):
        keys, counts, values = after.split([k.shape[-1], 1, v.shape[-1]], dim=-1)
        q = q * self.log_scale.to(q.dtype).exp().unflatten(0, (-1, self.site.group))[..., None]
        weights, log_sum = _weights(q @ keys.transpose(-1, -2), counts.transpose(-1, -2))
        return torch.cat([weights @ values, log_sum], dim=-1)

    def chunked(self, q, k, v, s, scan: Scan):
        (s,) = scan.mask_writes(s)
        q = q * self.log_scale.to(q.dtype).exp()[:, None]
        initial_state = scan.initial_state
        if initial_state is None:
            initial_state = k.new_zeros(k.shape[0], k.shape[2], s.shape[-1], k.shape[-1] + 1 + v.shape[-1])
        keys, counts, values = initial_state.split([k.shape[-1], 1, v.shape[-1]], dim=-1)
        scores, keys = simple_gla(q, k, s, initial_state=keys.transpose(-1, -2), segments=scan.segments)
        seen, counts = _running_counts(s, counts.squeeze(-1), scan.segments)
        weights, log_sum = _weights(scores, seen.repeat_interleave(self.site.group, 2))
        output, values = simple_gla(weights, s, v, initial_state=values, segments=scan.segments)
        return torch.cat([output, log_sum], dim=-1), torch.cat(
            [keys.transpose(-1, -2), counts[..., None], values], dim=-1
        )


def _running_counts(s: Tensor, before: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of s, [B, T, J, codes], over each token's document up to the token, and the last of them, [B, J, codes]; the
    first document goes on from `before`, [B, J, codes]."""
    # a difference of long sums: float64, where there is one
    wide = torch.cat([before[:, None], s], dim=1).to(s.dtype if s.device.type == "mps" else torch.float64)
    # a device adds up what lies together many times as fast
    sums = wide.movedim(1, -1).contiguous().cumsum(-1).movedim(-1, 1) if s.is_cuda else wide.cumsum(1)
    if segments is None:
        counts = sums[:, 1:]
    else:
        slots = torch.arange(1, segments.shape[1], device=s.device)
        starts = torch.where(segments[:, 1:] != segments[:, :-1], slots, 0).cummax(-1).values
        starts = F.pad(starts, (1, 0))  # slot of each token's document's first token
        earlier = sums.gather(1, starts[:, :, None, None].expand_as(s))
        counts = sums[:, 1:] - earlier * (starts > 0)[:, :, None, None]
    counts = counts.to(s.dtype)
    return counts, counts[:, -1] if counts.shape[1] else before


def _weights(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """w_c / sum_c w_c N_c and the logarithm of that sum, [..., 1], from the sums of scores over each code's keys and how many
    those are, [..., codes]."""
    unseen, counts = counts <= LEAST_COUNT, counts.clamp(min=LEAST_COUNT)
    means = scores / counts
    log_sum = (means + counts.log()).masked_fill(unseen, NEVER).logsumexp(-1, keepdim=True)
    return (means - log_sum).masked_fill(unseen, NEVER).exp(), log_sum


def _rounded(x: Tensor) -> Tensor:
    """To 16 bits: the last bits of a sum depend on how threads shared it out, and a conversion should not."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)


def _k_means(points: Tensor, count: int) -> Tensor:
    """Centres [count, K] of points [N, K]. The first are drawn far from one another (k-means++), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    centres = points[:1]
    distances = torch.full_like(points[:, 0], float("inf"))
    for _ in range(1, count):
        distances = torch.minimum(distances, (points - centres[-1]).square().sum(-1))
        drawn = torch.multinomial(distances + 1e-12, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    for _ in range(ITERATIONS):
        nearest = (points @ centres.T - 0.5 * centres.square().sum(-1)).argmax(-1)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
