"""Vector-quantised attention: the state stores the means of a few clusters of keys, and softmax attends to the means.

    s_t = softmax(A k_t + a)                                       k before rotary: clusters know no positions
    N_t = N_{t-1} + s_t,  M_t = M_{t-1} + s_t k~_t^T,  S_t = S_{t-1} + s_t v_t^T         k~ after rotary
    o_t = sum_c w_c S_{t,c} / sum_c w_c N_{t,c},  w_c = exp(scale q~_t . M_{t,c} / N_{t,c})

Source: Transformer-VQ, arXiv 2309.16354, theorem 3.7, with two changes:

* The codes that stand for past keys are the running means of the keys assigned to them, after rotary, so they carry
  positions. Reading them takes the two passes of gated slot attention (arXiv 2409.07146).
* The assignment s is a sharp softmax in fifteenths: gradients reach it, and a cache stores half a byte per code.

With `mix: joint` the weights w share the window's normaliser in the base model's own unit. Their sum is returned as its
logarithm, so that a term common to all scores cancels, as in softmax. `fit` finds the clusters.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.errors import ConfigError
from linearize.mixers.mixer import NEVER, Mixer, Scan, Site, outer
from linearize.ops.chunks import state_dtype
from linearize.ops.simple_gla import simple_gla

# factor of the assignment's scores: most tokens then go to one cluster, and gradients still reach the others
SHARPNESS = 8.0
# an assignment from 0 to 1 is a whole number of steps, in four bits
STEPS = 15
# rounds of k-means (Lloyd's algorithm) after its first choice of centres
K_MEANS_ROUNDS = 10
# a cluster with a smaller count is empty: half a step
LEAST_COUNT = 0.5 / STEPS


class VectorQuantized(Mixer):
    """o_t = sum_c w_c S_{t,c} / sum_c w_c N_{t,c},  w_c = exp(scale q_t . M_{t,c} / N_{t,c})

    No decay. The state is [codes, K + 1 + V]: key sums M, counts N, value sums S. Every query head learns its scale.

    Args:
        codes: clusters per key/value head, an even number.
    """

    rotary = True
    normalization = "sum"
    log_normaliser = True
    assigns = True
    starts_unfitted = True

    def __init__(self, site: Site, codes: int = 16):
        super().__init__(site)
        if codes % 2:
            raise ConfigError(f"mixer_options.codes: got {codes}, which is odd; an even number is needed")
        J, K = len(site.heads), site.head_dim
        self.codes = codes
        self.key_codes = nn.Parameter(torch.empty(J, codes, K))
        self.key_bias = nn.Parameter(torch.empty(J, codes))
        self.log_scale = nn.Parameter(torch.empty(J * site.group))

    def reset_parameters(self) -> None:
        """Set the codes to random directions, the same in every process; `fit` finds better ones."""
        codes = torch.randn(self.key_codes.shape, generator=torch.Generator().manual_seed(self.site.layer))
        self.key_codes.copy_(codes)
        self.key_bias.copy_(-0.5 * codes.square().sum(-1))
        self.log_scale.fill_(-0.5 * math.log(self.site.head_dim))

    @torch.no_grad()
    def fit(self, q: Tensor, q_rotary: Tensor, k: Tensor, scale: float) -> None:
        """Find the codes by k-means over keys.

        The distance of two keys is the mean square difference of the scores that queries give them. Queries are rotated
        by the average rotation over the positions in `q_rotary`. Channels that rotate fast average out and do not
        count. Everything is computed in float64 and rounded, so that every run finds the same parameters.
        """
        group = self.site.group
        for j in range(len(self.site.heads)):
            plain, rotated = (x[:, j * group : (j + 1) * group].flatten(0, 1).cpu().double() for x in (q, q_rotary))
            rotation = torch.linalg.lstsq(plain, rotated).solution
            queries = scale * plain @ rotation
            moment = queries.T @ queries / queries.shape[0]
            # a Cholesky factor exists only if no direction is left without queries
            moment.diagonal().add_(1e-4 * moment.diagonal().mean() + 1e-12)
            # maps keys to points whose squared distance is the mean square difference of scores
            metric = rotation @ torch.linalg.cholesky(moment)
            codes = _k_means(k[:, j].cpu().double() @ metric, self.codes)
            self.key_codes[j] = _rounded(SHARPNESS * codes @ metric.T)
            self.key_bias[j] = _rounded(-0.5 * SHARPNESS * codes.square().sum(-1))
        self.log_scale.fill_(math.log(scale))

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (self.codes, self.site.head_dim + 1 + value_dim)

    def assign(self, k: Tensor) -> Tensor:
        k, codes, bias = (x.to(state_dtype(k)) for x in (k, self.key_codes, self.key_bias))
        s = (torch.einsum("...k,...ck->...c", k, codes) + bias).softmax(-1)
        rounded = (s * STEPS).round() / STEPS
        # straight-through: gradients ignore the rounding
        return s + (rounded - s).detach() if s.requires_grad else rounded

    def assignment_bytes(self) -> int:
        return self.codes // 2

    def encode_assignment(self, assignment: Tensor) -> Tensor:
        low, high = (assignment * STEPS).round().to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return low | (high << 4)

    def decode_assignment(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack([encoded & 15, encoded >> 4], dim=-1).flatten(-2).to(dtype) / STEPS

    def update_inputs(self, k: Tensor, gate_offset: Tensor | None, assignment: Tensor | None) -> list[Tensor]:
        """Return the assignment s, [..., J, codes], computed from the key where none is given."""
        return [self.assign(k) if assignment is None else assignment]

    def update(self, state: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return state + outer(s, torch.cat([k, torch.ones_like(k[..., :1]), v], dim=-1))

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, counts, values = after.split([k.shape[-1], 1, v.shape[-1]], dim=-1)
        q = q * self.log_scale.to(q.dtype).exp().unflatten(0, (-1, self.site.group))[..., None]
        weights, log_sum = _weights(q @ keys.transpose(-1, -2), counts.transpose(-1, -2))
        return torch.cat([weights @ values, log_sum], dim=-1)

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        (s,) = scan.mask_writes(s)
        q = q * self.log_scale.to(q.dtype).exp()[:, None]
        initial_state = scan.initial_state
        if initial_state is None:
            initial_state = k.new_zeros(k.shape[0], k.shape[2], s.shape[-1], k.shape[-1] + 1 + v.shape[-1])
        keys, counts, values = initial_state.split([k.shape[-1], 1, v.shape[-1]], dim=-1)
        scores, keys = simple_gla(q, k, s, initial_state=keys.transpose(-1, -2), segments=scan.segments)
        running, counts = _running_counts(s, counts.squeeze(-1), scan.segments)
        weights, log_sum = _weights(scores, running.repeat_interleave(self.site.group, 2))
        output, values = simple_gla(weights, s, v, initial_state=values, segments=scan.segments)
        return torch.cat([output, log_sum], dim=-1), torch.cat(
            [keys.transpose(-1, -2), counts[..., None], values], dim=-1
        )


def _running_counts(s: Tensor, initial: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count, at each token, the tokens of its document so far that are assigned to each code.

    Args:
        s: the assignment, [B, T, J, codes].
        initial: counts that the first document starts from, [B, J, codes].
        segments: [B, T] document numbers, or None.

    Returns:
        counts [B, T, J, codes]; the last of them, [B, J, codes].
    """
    # a document's count is a difference of long sums, so it needs float64, which MPS lacks
    addends = torch.cat([initial[:, None], s], dim=1).to(s.dtype if s.device.type == "mps" else torch.float64)
    # CUDA sums adjacent elements many times as fast
    sums = addends.movedim(1, -1).contiguous().cumsum(-1).movedim(-1, 1) if s.is_cuda else addends.cumsum(1)
    if segments is None:
        counts = sums[:, 1:]
    else:
        slots = torch.arange(1, segments.shape[1], device=s.device)
        # for each token, the slot where its document starts
        starts = torch.where(segments[:, 1:] != segments[:, :-1], slots, 0).cummax(-1).values
        starts = F.pad(starts, (1, 0))
        sums_at_start = sums.gather(1, starts[:, :, None, None].expand_as(s))
        # the first document goes on from the initial counts, every other starts at zero
        counts = sums[:, 1:] - sums_at_start * (starts > 0)[:, :, None, None]
    counts = counts.to(s.dtype)
    return counts, counts[:, -1] if counts.shape[1] else initial


def _weights(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weights of the codes: a softmax over mean scores, in which a code counts once for each of its keys.

    Args:
        scores: sum of the scores of each code's keys, [..., codes].
        counts: N_c, [..., codes].

    Returns:
        w_c / sum_c w_c N_c, [..., codes]; the logarithm of that sum, [..., 1].
    """
    empty, counts = counts <= LEAST_COUNT, counts.clamp(min=LEAST_COUNT)
    mean_scores = scores / counts
    log_sum = (mean_scores + counts.log()).masked_fill(empty, NEVER).logsumexp(-1, keepdim=True)
    return (mean_scores - log_sum).masked_fill(empty, NEVER).exp(), log_sum


def _rounded(x: Tensor) -> Tensor:
    """Round to 16 bits of mantissa. The last bits of a sum depend on the number of threads; a conversion must not."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)


def _k_means(points: Tensor, clusters: int) -> Tensor:
    """Cluster points [N, D] with k-means and return the centres [clusters, D].

    The first centres are chosen as in k-means++. The seed is fixed, so that every call returns the same.
    """
    generator = torch.Generator().manual_seed(0)
    centres = points[:1]
    # of each point to the nearest centre so far
    squared_distances = torch.full_like(points[:, 0], float("inf"))
    for _ in range(1, clusters):
        to_newest = (points - centres[-1]).square().sum(-1)
        squared_distances = torch.minimum(squared_distances, to_newest)
        # 1e-12: where every point lies on a centre, all weights would be zero, and multinomial refuses that
        index = torch.multinomial(squared_distances + 1e-12, 1, generator=generator)
        centres = torch.cat([centres, points[index]])
    for _ in range(K_MEANS_ROUNDS):
        # nearest centre: |p - c|^2 is least where p.c - |c|^2 / 2 is largest
        nearest = (points @ centres.T - 0.5 * centres.square().sum(-1)).argmax(-1)
        sizes = torch.bincount(nearest, minlength=clusters)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        # a cluster without points keeps its centre
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres
