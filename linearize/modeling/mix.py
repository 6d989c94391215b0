"""Make one output of a softmax window and a recurrent branch.

    sum      o = w_window window + w_recurrent recurrent        (Liger attention, arXiv 2503.01496; 0.5 and 0.5)
    outside  o = (sum_window p_j v_j + c sum_past f_j v_j) / (sum_window p_j + c sum_past f_j)
             o = window + s rms_norm(recurrent), where the f_j can be negative
    joint    o = (sum_window e_j v_j + c sum_past f_j v_j) / (sum_window e_j + c sum_past f_j)
                                                                (LoLCATs, arXiv 2410.10254, equation 6)

p are the window's softmax weights (they sum to one), e the exponentials that they come from, and f_j is the weight that
the mixer gives token j: feature(q) . feature(k_j) times the decay since j. c = exp(log_mass) and s are one learned
number per query head. In `outside` window and past share one normaliser, counted in units of the window's own mass; in
`joint` the unit is the base model's own. With a small c, or s = 0, the output is that of window + sinks.

The functions return the two addends of the output, so that a caller can also weigh them against each other.

Shapes: B batch, T queries, H query heads, K head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linearize.mixers.mixer import NEVER

# added to mean squares and sums before a division, as the families' own RMS norms do; far below any float32 activation
NORM_EPSILON = 1e-6


class Addends(NamedTuple):
    """The window's and the recurrent branch's part of an output: [B, T, H, K] each."""

    window: Tensor
    recurrent: Tensor

    def sum(self) -> Tensor:
        """Return the output, [B, T, H, K]."""
        return self.window + self.recurrent

    def recurrent_share(self) -> Tensor:
        """Return the recurrent part's share of the two norms, averaged over tokens: [H]."""
        window, recurrent = (part.float().norm(dim=-1).mean((0, 1)) for part in self)
        return recurrent / (window + recurrent).clamp(min=NORM_EPSILON)


def weighted_sum(window: Tensor, recurrent: Tensor, weights: Tensor) -> Addends:
    """Mix as `sum`: weights [2, H, 1] of window and recurrent branch, both [B, T, H, K]."""
    return Addends(weights[0] * window, weights[1] * recurrent)


def scaled_branch(window: Tensor, recurrent: Tensor, scale: Tensor) -> Addends:
    """Mix as `outside` for weights f_j that can be negative: add the normed branch times a scale s, [H]."""
    return Addends(window, scale[:, None] * rms_norm(recurrent))


def shared_normaliser(window: Tensor, past: Tensor, log_odds: Tensor) -> Addends:
    """Mix as `outside` or `joint` for weights f_j that are never negative.

    Args:
        window: [B, T, H, K], the window's softmax average.
        past: [B, T, H, K], the average of the past's values under the weights f_j.
        log_odds: [B, T, H, 1], logarithm of the past's mass over the window's: of c sum_past f_j, or of that over
            sum_window e_j in `joint`.
    """
    # the smaller share has all of the gradient's digits; one minus the larger share has lost most of them
    past_is_smaller = log_odds < 0
    smaller = torch.where(past_is_smaller, log_odds, -log_odds).sigmoid()
    larger = 1 - smaller
    window_share = torch.where(past_is_smaller, larger, smaller)
    past_share = torch.where(past_is_smaller, smaller, larger)
    return Addends(window_share * window, past_share * past)


def split_normaliser(output: Tensor, *, is_log: bool) -> tuple[Tensor, Tensor]:
    """Split the output of a mixer with weights f_j that are never negative into their average and their sum.

    Args:
        output: [B, T, H, K + 1], with a last column for the sum of the weights.
        is_log: true if the mixer has divided by that sum itself and the column holds its logarithm.

    Returns:
        The average [B, T, H, K] and the logarithm of the sum [B, T, H, 1]: `NEVER` where there is no weight.
    """
    values, total = output.split([output.shape[-1] - 1, 1], dim=-1)
    if is_log:
        return values, total
    smallest = torch.finfo(total.dtype).tiny
    has_weight, total = total > smallest, total.clamp(min=smallest)
    return values / total, torch.where(has_weight, total.log(), NEVER)


def rms_norm(x: Tensor) -> Tensor:
    """Divide x by the root mean square of its last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON)
