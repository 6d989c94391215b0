"""The linear heads of one layer: a softmax window with sinks, a recurrent branch, and the mix of the two (mix.py).

In the mixes `outside` and `joint` the recurrent branch sees only tokens that have left the window (RAttention, arXiv
2506.15545): it is the same causal operator run on keys, values and gates delayed by the window, sinks left out. In
`sum` it sees every token.

Shapes: B batch, T queries, H query heads, J key/value heads, K head dim, V value dim, D hidden size.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.mixer import RecurrentInputs, Site
from linearize.mixers.registry import build_mixer
from linearize.modeling.context import Context, Slots, Step
from linearize.modeling.mix import (
    NORM_EPSILON,
    Addends,
    rms_norm,
    scaled_branch,
    shared_normaliser,
    split_normaliser,
    weighted_sum,
)
from linearize.modeling.offloading import require_in_memory
from linearize.modeling.window_heads import WindowHeads
from linearize.ops.chunks import state_dtype
from linearize.ops.window import Scores
from linearize.plan import MIX_OPTIONS, NO_BRANCH, LayerPlan

# subtracted from the log mass of a mixer that has yet to be fitted: a share of e^-6, 0.25%, of what it would start with
UNFITTED_PENALTY = 6.0


def build_linear_heads(plan: LayerPlan, site: Site, hidden_size: int) -> WindowHeads:
    """Build the linear heads of a layer by its plan."""
    return WindowHeads(plan, site) if plan.mixer == NO_BRANCH else LinearHeads(plan, site, hidden_size)


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """Make new tensors float32 inside, so that first values do not depend on the dtype that the model is loaded in."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


class LinearHeads(WindowHeads):
    """A softmax window, a recurrent branch and their mix. Its parameters are all that a conversion adds to a layer.

    Attributes:
        structure: the mixer. Its name is part of parameter names in checkpoints.
        mix, mix_options: the way to mix and its settings.
        shared: true if window and past share one normaliser; false if the normed branch is added to the window.
        log_mass: [H], logarithm of the factor c of the past's mass, if `shared`.
        branch_scale: [H], the factor s of the normed branch, in `outside` if not `shared`.
        branch_weights: [2, H], the learned weights of window and recurrent branch in `sum`.
        gate_projection: [J * gate width, D], a learned gate's projection of the hidden states.
        recurrent_enabled: set to False, the heads are window + sinks alone, the training-free baseline.
        window_enabled: set to False, the heads are the recurrent branch alone.
    """

    log_mass: nn.Parameter | None
    branch_scale: nn.Parameter | None
    branch_weights: nn.Parameter | None
    gate_projection: nn.Parameter | None

    @_float32()
    def __init__(self, plan: LayerPlan, site: Site, hidden_size: int):
        super().__init__(plan, site)
        self.mix = plan.mix
        self.mix_options = {**MIX_OPTIONS[plan.mix], **plan.mix_options}
        self.delayed = plan.mix != "sum"
        self.structure = build_mixer(plan.mixer, site, plan.mixer_options)
        self.recurrent_enabled = self.window_enabled = True
        # a mixer that has yet to be fitted starts with next to no mass, unless the plan sets the mass
        unfitted = self.structure.starts_unfitted and "log_mass" not in plan.mix_options
        self.unfitted_penalty = UNFITTED_PENALTY if unfitted else 0.0
        self.shared = self.delayed and self.structure.positive

        query_heads = len(site.heads) * site.group
        gate_numbers = len(site.heads) * self.structure.gate_width()
        learned_weights = self.mix == "sum" and self.mix_options["learned"]
        self.register_parameter("log_mass", _new_parameter(query_heads) if self.shared else None)
        scaled = self.delayed and not self.shared
        self.register_parameter("branch_scale", _new_parameter(query_heads) if scaled else None)
        self.register_parameter("branch_weights", _new_parameter(2, query_heads) if learned_weights else None)
        learned_gate = plan.gate == "learned"
        self.register_parameter("gate_projection", _new_parameter(gate_numbers, hidden_size) if learned_gate else None)
        self.reset_parameters()

    @_float32()
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its first value."""
        self.structure.reset_parameters()
        if self.log_mass is not None:
            unit = self.structure.log_unit if self.mix == "outside" else 0.0
            self.log_mass.fill_(self.mix_options["log_mass"] - unit - self.unfitted_penalty)
        if self.branch_scale is not None:
            self.branch_scale.fill_(self.mix_options["branch_scale"])
        if self.branch_weights is not None:
            self.branch_weights[0].fill_(self.mix_options["window_weight"])
            self.branch_weights[1].fill_(self.mix_options["recurrent_weight"])
        if self.gate_projection is not None:
            self.gate_projection.zero_()

    def state_shape(self) -> tuple[int, ...]:
        """Return the shape of one key/value head's recurrent state."""
        return self.structure.state_shape(self.site.head_dim + self._counts_weights)

    @property
    def _counts_weights(self) -> bool:
        """True if a column of ones beside the values counts the sum of the weights."""
        return not self.structure.log_normaliser and (self.shared or self.structure.normalization == "sum")

    def recurrent_input_bytes(self, width: int) -> int:
        """Return the bytes per token and key/value head that a window's cache stores; see `WindowHeads`."""
        if not self.delayed:
            return 0
        if self.structure.rotary:
            return self.structure.assignment_bytes()
        if self.gate_projection is None:
            return width * self.site.head_dim
        return 4 * (self.site.head_dim + self.structure.gate_width())  # key and gate logits in float32

    def recurrent_inputs(self, k: Tensor, hidden: Tensor) -> RecurrentInputs:
        """Return the recurrent branch's inputs, from keys before rotary [B, T, J, K] and hidden states [B, T, D]."""
        if self.structure.rotary:
            if not self.structure.assigns:
                return RecurrentInputs()
            require_in_memory(next(self.structure.parameters()))
            with torch.autocast(k.device.type, enabled=False):
                return RecurrentInputs(assignment=self.structure.assign(k))
        if self.gate_projection is None:
            return RecurrentInputs(keys=k)
        require_in_memory(self.gate_projection)
        dtype = state_dtype(hidden)
        with torch.autocast(k.device.type, enabled=False):
            offset = F.linear(hidden.to(dtype), self.gate_projection.to(dtype)).unflatten(-1, (k.shape[2], -1))
        return RecurrentInputs(keys=k.to(dtype), gate_offset=offset)

    def encode_inputs(self, inputs: RecurrentInputs) -> RecurrentInputs:
        """Encode recurrent inputs for a cache."""
        if inputs.assignment is None:
            return inputs
        return inputs._replace(assignment=self.structure.encode_assignment(inputs.assignment))

    def decode_context(self, context: Context | Step, newest: RecurrentInputs) -> Context | Step:
        """Decode a cache's context. Its newest tokens take their inputs, and the gradients of these, from `newest`."""
        if newest.assignment is None:
            return context
        dtype = newest.assignment.dtype
        return context.decode_assignments(newest.assignment, lambda x: self.structure.decode_assignment(x, dtype))

    def attend(
        self, q: Tensor, q_rotary: Tensor, context: Context | Step, scores: Scores, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in one part; arguments and results as in `WindowHeads.forward`."""
        if not self.recurrent_enabled:
            return super().attend(q, q_rotary, context, scores, state)
        window, log_sum = self.attend_window(q_rotary, context, scores, with_log_sum=self.mix == "joint")
        queries = q_rotary if self.structure.rotary else q
        if not self.delayed:
            recurrent, state = self.attend_recurrent(queries, context, state, start=0, delay=0)
            return self._output(self.mix_outputs(window, log_sum, recurrent)).to(q.dtype), state
        # the first query with a token outside its window; before it the output is that of the window alone
        start = max(0, self.window - (context.length - q.shape[1]))
        if start >= q.shape[1]:
            return window if self.window_enabled else torch.zeros_like(window), state
        past, state = self.attend_recurrent(queries, context, state, start=start, delay=self.window)
        early, late = window.split([start, q.shape[1] - start], dim=1)
        late = self._output(self.mix_outputs(late, None if log_sum is None else log_sum[:, start:], past))
        early = early if self.window_enabled else torch.zeros_like(early)
        return torch.cat([early, late.to(q.dtype)], dim=1), state

    def mix_outputs(self, window: Tensor, log_sum: Tensor | None, recurrent: Tensor) -> Addends:
        """Mix the window's and the recurrent branch's output as the plan says.

        Args:
            window: [B, T, H, K].
            log_sum: [B, T, H, 1], logarithm of the window's sum of exponentials, in the mix `joint`.
            recurrent: [B, T, H, V], the output of `attend_recurrent`.
        """
        if self.branch_scale is not None:
            return scaled_branch(window, recurrent, self.branch_scale)
        if self.log_mass is None:
            return weighted_sum(window, recurrent, self._weights(window))
        past, log_count = split_normaliser(recurrent, is_log=self.structure.log_normaliser)
        if not self.window_enabled:
            return Addends(torch.zeros_like(window), past)
        # the window's mass is one in `outside`: its weights sum to one
        log_odds = self.log_mass[:, None] + log_count - (0.0 if log_sum is None else log_sum)
        return shared_normaliser(window, past, log_odds)

    def _output(self, addends: Addends) -> Tensor:
        """Return the output of a mix, [B, T, H, K], and record the recurrent branch's share of it."""
        if self.shares is not None:
            self.shares.append(addends.recurrent_share())
        return addends.sum() if self.window_enabled else addends.recurrent

    def attend_recurrent(
        self, q: Tensor, context: Context | Step, state: Tensor | None, *, start: int, delay: int
    ) -> tuple[Tensor, Tensor]:
        """Run the mixer for queries `start`.. over the tokens that came `delay` slots before them.

        Args:
            q: [B, T, H, K], before or after rotary as the mixer needs them.
            state: the recurrent state before the first of those tokens.

        Returns:
            output [B, T - start, H, V], with a last column for the sum of the weights if `shared`; the new state.
        """
        count = q.shape[1] - start
        dtype = state_dtype(q)
        slots = context.behind(count, delay)
        inputs = slots.recurrent_inputs
        keys = slots.keys if inputs.keys is None else inputs.keys
        values = slots.values.to(dtype)
        if self._counts_weights:
            values = F.pad(values, (0, 1), value=1.0)
        # of the queries, which can be in other documents than the slots that they read
        query_segments = None if slots.segments is None else context.behind(count, delay=0).segments
        write_mask = self._write_mask(context, slots, query_segments, count, delay)
        recurrence = self.structure.naive if count == 1 else self.structure
        # autocast does not reach inside: states and the sums that they hold stay float32
        with torch.autocast(q.device.type, enabled=False):
            output, state = recurrence(
                q[:, start:].to(dtype),
                keys.to(dtype),
                values,
                gate_offset=inputs.gate_offset,
                assignment=inputs.assignment,
                write_mask=write_mask,
                initial_state=state,
                segments=query_segments,
            )
        if not self.shared and self.structure.normalization == "sum":
            total = 1.0 if self.structure.log_normaliser else output[..., -1:] + NORM_EPSILON
            output = output[..., :-1] / total
        if not self.delayed and self.structure.normalization == "rms":
            output = rms_norm(output)
        return output, state

    def _write_mask(
        self, context: Context | Step, slots: Slots, query_segments: Tensor | None, count: int, delay: int
    ) -> Tensor | None:
        """Return True for each token that is written to the state, [B or 1, count]; None if all are.

        Padding is not written. A token is not written either if the query of its step is in another document. A delayed
        branch reads only tokens that have left the window. Sinks are not written to it, since softmax still sees them.

        Args:
            slots: the `count` tokens, `delay` slots before their queries.
            query_segments: [B, count] document numbers of the queries; None for one document.
        """
        write_mask: Tensor | None = None
        first_slot = context.end - delay - count
        # in a plain context, a token's slot is its number in the document
        may_hold_sinks_or_padding = not context.is_plain or first_slot < self.sinks
        if not self.delayed:
            write_mask = slots.key_mask if slots.is_new is None else slots.is_new
        elif may_hold_sinks_or_padding and slots.ordinals is not None:
            # a sink's ordinal is below `sinks`, and so is that of padding, -1
            write_mask = slots.ordinals >= self.sinks
        if slots.segments is not None and query_segments is not None:
            same_document = slots.segments == query_segments
            write_mask = same_document if write_mask is None else write_mask & same_document
        return write_mask

    def _weights(self, like: Tensor) -> Tensor:
        """Return the weights of window and recurrent branch in the mix `sum`: [2, H, 1], or [2, 1, 1] if fixed."""
        if self.branch_weights is not None:
            return self.branch_weights[..., None]
        pair = [self.mix_options["window_weight"], self.mix_options["recurrent_weight"]]
        return torch.tensor(pair, device=like.device)[:, None, None]

    @property
    def scalable(self) -> bool:
        """True if one factor per query head scales the recurrent branch."""
        return self.log_mass is not None or self.branch_scale is not None

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the mass or the scale of the recurrent branch by a factor."""
        if self.log_mass is not None:
            self.log_mass.add_(math.log(factor))
        if self.branch_scale is not None:
            self.branch_scale.mul_(factor)


def _new_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter without values, which `reset_parameters` sets."""
    return nn.Parameter(torch.empty(shape))
