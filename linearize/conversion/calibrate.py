"""Calibrate the added parameters: give them first values from the base model's own statistics, without gradients.

1. Run the base model over rows of text and of random tokens copied from far back. Observe every linear head beside the
   softmax attention that it replaces.
2. Let each recurrent structure find its parameters in all rows but two (`Mixer.fit`).
3. Fit the mix on these two rows, one of text and one of copies: for each query head find the share of the recurrent
   branch that brings it nearest to softmax, and give it half of that share. If no share helps, the head gets none, so
   that it starts no worse than window + sinks.
4. Run the whole model over the held-out row of text with all, a half, a quarter and a sixteenth of these shares. Take
   the part that is nearest to the base. Heads that each come nearer to softmax can together move away from it.

One layer's activations are in memory at a time. Rows start at different positions, so that whatever reads keys after
rotary meets positions from the model's whole range.

Shapes: B rows, T tokens, H query heads, K head dim.
"""

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.names import ADDED
from linearize.checkpoint.result_cache import cached_on_disk, unfinished_folder
from linearize.checkpoint.source import Source
from linearize.data.recall_rows import SPAN, recall_task
from linearize.device import compute_dtype, pick_device
from linearize.errors import CheckpointError
from linearize.modeling.attention_call import Observation
from linearize.modeling.context import context_of
from linearize.modeling.fit_mix import fit_mix
from linearize.modeling.layer_stream import LayerStream
from linearize.modeling.linear_heads import LinearHeads
from linearize.modeling.loading import open_unconverted
from linearize.ops.dispatch import without_kernels
from linearize.plan import Plan
from linearize.progress import doing
from linearize.training.losses import chunk_for, chunked_kl

# of the fit; cached outcomes of another one are computed again
VERSION = 1
# rows that only the mix is fitted on: one of text, then one of copies
HELD_OUT = 2
# far from any seed that an evaluation is likely to use
SEED = 777_002
# every head gets half of the share that serves it best alone: undamped shares together blur copies from far back
# (SmolLM2-135M: recall at 1,024 tokens .89 of the base's undamped, .95 damped; perplexity at 2,048 no worse)
DAMPING = math.log(2)
# windows that the row takes on which parts are tried; the first does not count
PART_WINDOWS = 3
# parts of the shares that are tried in all heads at once
PARTS = (1.0, 0.5, 0.25, 0.0625)
# settings that fix what `fit_mix` would find
FITTED_OPTIONS = {"log_mass", "branch_scale", "window_weight", "recurrent_weight"}


@dataclass(frozen=True)
class Calibration:
    """The outcome of a calibration.

    Attributes:
        tensors: the added parameters by their names in the checkpoint.
        errors: layer -> mean square error beyond the window relative to the base's attention, of window + sinks and as
            fitted.
        rows, tokens: number of rows, and tokens in each.
        text: name of the dataset.
        part: part of the fitted shares that the branches got; None if no share was fitted.
        divergence: KL from the base beyond the window on one row of text, in nats a token, of window + sinks and as
            fitted; None if no share was fitted.
    """

    tensors: dict[str, Tensor]
    errors: dict[int, tuple[float, float]]
    rows: int
    tokens: int
    text: str
    part: float | None = None
    divergence: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record for linearize.json."""
        return {
            "text": self.text,
            "rows": self.rows,
            "tokens": self.tokens,
            "attention_error": {str(layer): list(pair) for layer, pair in self.errors.items()},
            "part": self.part,
            "divergence": self.divergence,
        }

    def to_stored(self) -> dict[str, Any]:
        """Return everything as JSON; `from_stored` reads it."""
        tensors = {
            name: [list(tensor.shape), base64.b64encode(tensor.float().numpy().tobytes()).decode()]
            for name, tensor in self.tensors.items()
        }
        return {**self.to_dict(), "tensors": tensors}

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> "Calibration":
        """Read what `to_stored` returned."""
        return cls(
            tensors={
                name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(shape)
                for name, (shape, text) in stored["tensors"].items()
            },
            errors={int(layer): (pair[0], pair[1]) for layer, pair in stored["attention_error"].items()},
            rows=stored["rows"],
            tokens=stored["tokens"],
            text=stored["text"],
            part=stored["part"],
            divergence=None if stored["divergence"] is None else tuple(stored["divergence"]),
        )


def calibrate(
    source: Source,
    plan: Plan,
    ids: Tensor,
    text: str,
    progress: Callable[[str], None] = lambda message: None,
    part: float | None = None,
) -> Calibration:
    """Fit the parameters that a conversion adds. The outcome is cached on disk for the next conversion of this base.

    Args:
        ids: token ids [rows, T] of text, at least two rows, longer than every window.
        text: name of the dataset that the ids come from.
        part: part of the fitted shares that the branches get, if it is known; None: step 4 finds it.

    Raises:
        CheckpointError: the base computes values that are not finite.
    """
    key = {
        "version": VERSION,
        "base": source.fingerprint(),
        "plan": plan.to_dict(),
        "rows": sha256(ids.numpy().tobytes()),
        "part": part,
        "precision": str(compute_dtype("auto")),
    }

    def compute() -> dict[str, Any]:
        unfinished = unfinished_folder("calibrations", key)
        return _fit(source, plan, ids, text, progress, part, unfinished).to_stored()

    def announce() -> None:
        progress("calibrated by an earlier conversion of this base with the same settings")

    return cached_on_disk("calibrations", key, compute, announce, Calibration.from_stored)


@without_kernels()
@torch.no_grad()
def _fit(
    source: Source,
    plan: Plan,
    ids: Tensor,
    text: str,
    progress: Callable[[str], None],
    part: float | None,
    unfinished: Path,
) -> Calibration:
    """Fit what `calibrate` does."""
    device = pick_device()
    stream = open_unconverted(source, plan, dtype=compute_dtype("auto"), device=device, unfinished=unfinished)
    model, kept = stream.model, stream.kept_pass("fit")
    rows = _with_copies(ids, model.config).to(device)
    fitter = _LayerFitter(source.name, plan, progress)
    fitter.restore(model, kept.load("forward")[1])
    with doing("calibrating"), model.observed(fitter.fit):
        batches = stream.start([rows], [{"position_ids": _spread_positions(rows, model.config)}])
        stream.forward(batches, kept, state=lambda: fitter.state(model))
    kept.remove()
    attentions = [attention for _, attention in model.linear_attentions()]
    scalable = [
        attention.mixer for attention in attentions if attention.layer_idx in fitter.errors and attention.mixer.scalable
    ]
    divergence = None
    if scalable and part is not None:
        for branch in scalable:
            branch.scale(part)
    elif scalable:
        start = max(heads.window for heads in scalable)
        with doing("calibrating: the share of all branches"):
            part, window_alone, fitted = choose_part(stream, scalable, rows[-HELD_OUT][: PART_WINDOWS * start], start)
        divergence = (window_alone, fitted)
        progress(
            f"calibrated: {part:g} of the shares fitted; KL from the base {fitted:.4f} on text, {window_alone:.4f} "
            "with window + sinks"
        )
    tensors = {name: value.detach().cpu() for name, value in _added(model).items()}
    return Calibration(tensors, fitter.errors, len(rows), rows.shape[1], text, part, divergence)


@dataclass
class _LayerFitter:
    """Fit one layer after another while the base model runs over the rows.

    Attributes:
        errors: filled by `fit`; see `Calibration.errors`.
    """

    source_name: str
    plan: Plan
    progress: Callable[[str], None]
    errors: dict[int, tuple[float, float]] = field(default_factory=dict)

    def fit(self, observation: Observation) -> None:
        """Fit structure and mix of one layer (steps 2 and 3)."""
        layer, heads = observation.layer, observation.heads
        if not isinstance(heads, LinearHeads):
            return  # window and sinks alone have nothing to fit
        self._require_finite(observation)
        tensors = (observation.q, observation.q_rotary, observation.k)
        q, q_rotary, k = (x[:-HELD_OUT, heads.sinks :].flatten(0, 1) for x in tensors)
        heads.structure.fit(q, q_rotary, k, observation.scores.scale)
        if FITTED_OPTIONS & self.plan.layers[layer].mix_options.keys():
            return  # the user's settings fix the mix
        inputs = heads.recurrent_inputs(observation.k, observation.hidden_states).map(lambda x: x[-HELD_OUT:])
        context = context_of(observation.k_rotary[-HELD_OUT:], observation.v[-HELD_OUT:], inputs, sinks=heads.sinks)
        window_alone, fitted = fit_mix(
            heads,
            observation.q[-HELD_OUT:],
            observation.q_rotary[-HELD_OUT:],
            context,
            observation.target[-HELD_OUT:],
            observation.scores,
            damping=DAMPING,
        )
        self.errors[layer] = (window_alone.mean().item(), fitted.mean().item())
        self.progress(
            f"calibrating layer {layer + 1} of {len(self.plan.layers)}: error {self.errors[layer][0]:.4f} with window "
            f"+ sinks, {self.errors[layer][1]:.4f} fitted"
        )

    def state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what is fitted so far, for `restore`."""
        errors = [(float(layer), *pair) for layer, pair in self.errors.items()]
        return {**_added(model), "errors": torch.tensor(errors, dtype=torch.float64).view(-1, 3)}

    def restore(self, model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
        """Take over what an interrupted fit had fitted."""
        for name, tensor in _added(model).items():
            if name in saved and saved[name].shape == tensor.shape:
                tensor.copy_(saved[name])
        for layer, window_alone, fitted in saved["errors"].tolist() if "errors" in saved else []:
            self.errors[int(layer)] = (window_alone, fitted)

    def _require_finite(self, observation: Observation) -> None:
        """Refuse a base whose values are not finite, naming the layer."""
        if not all(x.isfinite().all() for x in (observation.q, observation.k, observation.target)):
            raise CheckpointError(
                f"{self.source_name}: layer {observation.layer} computes values that are not finite; its weights, or "
                "those before it, are damaged"
            )


def _added(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the added parameters of a model by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if ADDED in name}


def choose_part(
    stream: LayerStream, branches: list[LinearHeads], ids: Tensor, start: int
) -> tuple[float, float, float]:
    """Scale the branches' shares by the one of PARTS that brings the whole model nearest to its base (step 4).

    Args:
        branches: linear heads whose mix can be scaled by one factor.
        ids: a row of text [T].
        start: first token that counts.

    Returns:
        The part, and the divergence from the base of window + sinks and of that part, in nats a token.
    """
    counted = len(ids) - start
    weights = torch.full((counted,), 1 / counted, device=ids.device)

    def hidden_states() -> Tensor:
        return stream.last_hidden([ids])[0][start:]

    with stream.model.softmax_attention():
        base_hidden = hidden_states()

    def divergence() -> float:
        hidden = hidden_states()
        with stream.readout() as head:
            return chunked_kl(hidden, base_hidden, head, head, weights, chunk_for(head)).item()

    with stream.model.recurrent_branch_off():
        window_alone = divergence()
    divergences: dict[float, float] = {}
    present = 1.0
    for part in PARTS:
        for branch in branches:
            branch.scale(part / present)
        divergences[part], present = divergence(), part
        if divergences[part] > min(divergences.values()):
            break  # smaller parts are worse still
    best = min(divergences, key=divergences.__getitem__)
    for branch in branches:
        branch.scale(best / present)
    return best, window_alone, divergences[best]


def _with_copies(ids: Tensor, config: PretrainedConfig) -> Tensor:
    """Add two rows of random tokens that end with a copy of their start; the last two rows are held out.

    Returns:
        Rows [rows + 2, T] in the order: text, copies, held-out text, held-out copies.
    """
    length = ids.shape[1]
    span = min(SPAN, length // 2)
    copies = recall_task(length - span, 2, config.vocab_size, None, SEED).ids[:, :length]
    return torch.cat([ids[:-1], copies[:1], ids[-1:], copies[1:]])


def _spread_positions(rows: Tensor, config: PretrainedConfig) -> Tensor:
    """Return position ids [rows, T] that spread the rows over all positions of the model."""
    count, length = rows.shape
    distance = (config.max_position_embeddings - length) // max(1, count - 1)
    positions = torch.arange(length)[None] + distance * torch.arange(count)[:, None]
    return positions.to(rows.device)
