"""Calibration: the first values of the added parameters, from the base model's own statistics. No gradients.

1. Run the base model over rows of text and of random tokens copied from far back, every linear head observed beside the
   softmax attention that it replaces.
2. In all rows but one of each kind, let the structure find its parameters (`Mixer.fit`).
3. On those two, find for each query head the share of the recurrent branch that brings it nearest to softmax, none where
   none helps, and give it half of that: a head starts no worse than window + sinks.
4. Run the whole model over the row of text with all, a half, a quarter and a sixteenth of these shares, and take what is
   nearest to the base: heads that each come nearer to softmax can together come further from it.

One layer's activations are held at a time. Rows lie at different positions, so that what follows rotary is seen all over
the model's positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from linearize.checkpoint.names import ADDED
from linearize.checkpoint.source import Source
from linearize.data.recall_rows import SPAN, recall_task
from linearize.device import compute_dtype, pick_device
from linearize.errors import CheckpointError
from linearize.modeling.attention import Observation
from linearize.modeling.branch import LinearHeads
from linearize.modeling.cache import context_of
from linearize.modeling.loading import load_unconverted
from linearize.modeling.readout import readout_of
from linearize.ops.dispatch import without_kernels
from linearize.plan import Plan
from linearize.training.losses import chunked_kl

# rows that nothing but the mix is fitted on: one of text, one of copying
HELD = 2
SEED = 777_002
# every head's past at half of what serves it best alone: together they blur what is copied from far back (SmolLM2-135M: recall
# at 1,024 tokens .89 of the base's undamped, .95 damped; perplexity at 2,048 no worse)
DAMPING = math.log(2)
# what is tried of the shares fitted head by head, in all heads at once
PARTS = (1.0, 0.5, 0.25, 0.0625)
KL_CHUNK = 256
# settings that say what `LinearHeads.fit_mix` would find
FITTED_OPTIONS = {"log_mass", "branch_scale", "window_weight", "recurrent_weight"}


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        tensors: the added parameters by their names in the checkpoint.
        errors: layer -> mean square error beyond the window relative to the base's attention, of window + sinks and as
            fitted.
        part: of the shares fitted head by head that the branches got, None where nothing was fitted.
        divergence: KL from the base beyond the window on one row of text, in nats a token: of window + sinks and as fitted.
    """

    tensors: dict[str, Tensor]
    errors: dict[int, tuple[float, float]]
    rows: int
    tokens: int
    text: str
    part: float | None = None
    divergence: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What linearize.json says."""
        return {
            "text": self.text,
            "rows": self.rows,
            "tokens": self.tokens,
            "attention_error": {str(layer): list(pair) for layer, pair in self.errors.items()},
            "part": self.part,
            "divergence": self.divergence,
        }


@without_kernels()
@torch.no_grad()
def calibrate(
    source: Source, plan: Plan, ids: Tensor, name: str, progress: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Fits the parameters that a conversion adds.

    Args:
        ids: token ids [rows, T], at least two rows, longer than every window. name: where they come from.
    """
    device = pick_device()
    model = load_unconverted(source, plan, dtype=compute_dtype("auto")).to(device)
    copies = _copied_rows(2, ids.shape[1], model.config)
    ids = torch.cat([ids[:-1], copies[:1], ids[-1:], copies[1:]]).to(device)
    rows, length = ids.shape
    spread = (model.config.max_position_embeddings - length) // max(1, rows - 1)
    positions = torch.arange(length)[None] + spread * torch.arange(rows)[:, None]
    errors: dict[int, tuple[float, float]] = {}

    def fit(seen: Observation) -> None:
        branch = seen.branch
        if not isinstance(branch, LinearHeads):
            return  # window and sinks alone
        if not all(x.isfinite().all() for x in (seen.q, seen.k, seen.target)):
            raise CheckpointError(
                f"{source.name}: layer {seen.layer} computes values that are not finite; its weights, or those before it, are "
                "damaged"
            )
        branch.structure.fit(
            *(x[:-HELD, branch.sinks :].flatten(0, 1) for x in (seen.q, seen.q_rotary, seen.k)), seen.scores.scale
        )
        inputs = branch.recurrent_inputs(seen.k, seen.hidden_states).map(lambda x: x[-HELD:])
        context = context_of(seen.k_rotary[-HELD:], seen.v[-HELD:], inputs, sinks=branch.sinks)
        if FITTED_OPTIONS & plan.layers[seen.layer].mix_options.keys():
            return  # somebody decided
        held = (x[-HELD:] for x in (seen.q, seen.q_rotary))
        before, after = branch.fit_mix(*held, context, seen.target[-HELD:], seen.scores, damping=DAMPING)
        errors[seen.layer] = (before.mean().item(), after.mean().item())
        progress(
            f"calibrating layer {seen.layer + 1} of {len(plan.layers)}: error {errors[seen.layer][0]:.4f} with window + sinks, "
            f"{errors[seen.layer][1]:.4f} fitted"
        )

    with model.observed(fit):
        model.base_model(input_ids=ids, position_ids=positions.to(device), use_cache=False)
    part = divergence = None
    fitted = [mixer for layer, mixer in _branches(model) if layer in errors and mixer.scalable]
    if fitted:
        part, *divergence = _choose_part(model, fitted, ids[-HELD][None], max(mixer.window for mixer in fitted))
        progress(
            f"calibrated: {part:g} of the shares fitted; KL from the base {divergence[1]:.4f} on text, {divergence[0]:.4f} with "
            "window + sinks"
        )
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items() if ADDED in name}
    return Calibration(tensors, errors, rows, length, name, part, divergence)


def _branches(model: PreTrainedModel) -> list[tuple[int, LinearHeads]]:
    attentions = [attention for _, attention in model.linear_attentions()]
    return [(a.layer_idx, a.mixer) for a in attentions if isinstance(a.mixer, LinearHeads)]


def _choose_part(
    model: PreTrainedModel, branches: list[LinearHeads], ids: Tensor, start: int
) -> tuple[float, float, float]:
    """Leaves the branches with the part of their shares that brings the model nearest to its base on a row of text [1, T],
    from token `start` on; returns it, and the divergence of window + sinks and of what was chosen."""

    def hidden() -> Tensor:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, start:]

    def divergence() -> float:
        return chunked_kl(hidden(), wanted, head, head, weights, KL_CHUNK).item()

    head = readout_of(model)
    weights = torch.full((ids.shape[1] - start,), 1 / (ids.shape[1] - start), device=ids.device)
    with model.softmax_attention():
        wanted = hidden()
    with model.recurrent_branch_off():
        alone = divergence()
    found, now = {}, 1.0
    for part in PARTS:
        for branch in branches:
            branch.scale(part / now)
        found[part], now = divergence(), part
    best = min(found, key=found.get)
    for branch in branches:
        branch.scale(best / now)
    return best, alone, found[best]


def _copied_rows(rows: int, length: int, config: PretrainedConfig) -> Tensor:
    """Rows of random tokens [rows, length] that end with a copy of what they start with, as in evaluation/recall.py."""
    span = min(SPAN, length // 2)
    task = recall_task(length - span, rows, config.vocab_size, None, SEED)
    return task.ids[:, :length]
