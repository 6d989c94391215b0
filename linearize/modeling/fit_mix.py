"""Fit the mix of linear heads to the base model's output.

Shapes: B batch, T queries, H query heads, K head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.modeling.context import Context
from linearize.modeling.linear_heads import LinearHeads
from linearize.modeling.mix import NORM_EPSILON, rms_norm
from linearize.ops.window import Scores

# log masses that are tried: from no branch at all (e^-20) to four times the window's mass, finer where text needs them
LOG_MASSES = (-20.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


@dataclass
class MixSample:
    """The outputs of window and recurrent branch, and the output that their mix should have.

    Attributes:
        window, target: [B, T, H, K], float32.
        log_sum: [B, T, H, 1] in the mix `joint`, else None.
        recurrent: [B, T, H, V].
    """

    window: Tensor
    log_sum: Tensor | None
    recurrent: Tensor
    target: Tensor

    def error(self, output: Tensor) -> Tensor:
        """Return the square error of an output relative to the target, row by row: [B, H]."""
        power = self.target.square().sum((1, 3)).clamp(min=NORM_EPSILON)
        return (output - self.target).square().sum((1, 3)) / power


@torch.no_grad()
def fit_mix(
    heads: LinearHeads,
    q: Tensor,
    q_rotary: Tensor,
    context: Context,
    target: Tensor,
    scores: Scores,
    *,
    damping: float = 0.0,
) -> list[Tensor]:
    """Set the strength of the recurrent branch per query head: as near to `target` as it comes.

    In no row is the output further from `target` than that of window + sinks.

    Args:
        q, q_rotary: [B, T, H, K] before and after rotary, T beyond the window.
        context: the keys and values in reach.
        target: [B, T, H, K], the base model's own output.
        scores: the score function of the window.
        damping: subtracted from the best log mass.

    Returns:
        Square errors [H] over the tokens beyond the window, relative to `target` row by row: of window + sinks, and as
        fitted.
    """
    window, log_sum = heads.attend_window(q_rotary, context, scores, with_log_sum=heads.mix == "joint")
    start = heads.window if heads.delayed else 0
    queries = q_rotary if heads.structure.rotary else q
    recurrent, _ = heads.attend_recurrent(queries, context, None, start=start, delay=start)
    log_sum = None if log_sum is None else log_sum[:, start:]
    sample = MixSample(window[:, start:].float(), log_sum, recurrent, target[:, start:].float())
    window_error = sample.error(sample.window)
    if heads.log_mass is not None:
        _fit_log_mass(heads, heads.log_mass, sample, window_error, damping)
    elif heads.branch_scale is not None:
        _fit_branch_scale(heads, heads.branch_scale, sample, window_error)
    elif heads.branch_weights is not None:
        _fit_branch_weights(heads.branch_weights, sample)
    return [window_error.mean(0), _mixed_error(heads, sample).mean(0)]


def _mixed_error(heads: LinearHeads, sample: MixSample) -> Tensor:
    """Return the square error [B, H] of the mix as it stands."""
    return sample.error(heads.mix_outputs(sample.window, sample.log_sum, sample.recurrent).sum())


def _fit_log_mass(
    heads: LinearHeads, log_mass: Tensor, sample: MixSample, window_error: Tensor, damping: float
) -> None:
    """Try every one of `LOG_MASSES` and take the best that makes no row worse, less the damping."""
    errors = []
    for value in LOG_MASSES:
        log_mass.fill_(value)
        errors.append(_mixed_error(heads, sample))
    worse = (torch.stack(errors) > window_error).any(1)  # in some row
    worse[0] = False
    best = torch.stack(errors).mean(1).masked_fill(worse, float("inf")).min(dim=0)
    log_mass.copy_(torch.tensor(LOG_MASSES, device=log_mass.device)[best.indices] - damping)


def _fit_branch_scale(heads: LinearHeads, scale: Tensor, sample: MixSample, window_error: Tensor) -> None:
    """Set the scale by least squares, and to zero where a row becomes worse."""
    normed = rms_norm(sample.recurrent)
    cross = ((sample.target - sample.window) * normed).sum((0, 1, 3))
    power = (normed * normed).sum((0, 1, 3))
    scale.copy_(cross / power.clamp(min=NORM_EPSILON))
    worse = (_mixed_error(heads, sample) > window_error).any(0)
    scale.masked_fill_(worse, 0.0)


def _fit_branch_weights(weights: Tensor, sample: MixSample) -> None:
    """Set the weights of window and recurrent branch by least squares, head by head."""
    parts = torch.stack([sample.window, sample.recurrent], dim=-1).permute(2, 0, 1, 3, 4).flatten(1, 3)  # [H, N, 2]
    expected = sample.target.permute(2, 0, 1, 3).flatten(1)[..., None]
    weights.copy_(torch.linalg.lstsq(parts, expected).solution[..., 0].T)
