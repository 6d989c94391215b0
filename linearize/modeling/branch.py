"""The linear heads of one layer: a softmax window with sinks, a recurrent branch, and the way the two are mixed.

    sum      o = w_window window + w_recurrent recurrent        (Liger attention, arXiv 2503.01496; 0.5 and 0.5)
    outside  o = (sum_window p_j v_j + c sum_past f_j v_j) / (sum_window p_j + c sum_past f_j)
             o = window + s rms_norm(recurrent), where the f_j can be negative
    joint    o = (sum_window e_j v_j + c sum_past f_j v_j) / (sum_window e_j + c sum_past f_j)
                                                                (LoLCATs, arXiv 2410.10254, equation 6)

In `outside` and `joint` the recurrent branch sees only tokens that have left the window (RAttention, arXiv
2506.15545): it is the same causal operator run on keys, values and gates delayed by the window, sinks left out.
p are the window's softmax weights (they sum to one), e the exponentials they come from, and f_j is what the structure
gives token j: feature(q) . feature(k_j) times the decay since j. c = exp(log_mass) and s are one learned number per
query head. In `outside` window and past share one normaliser, counted in units of the window's own mass; in `joint`
the unit is the base model's own. The past's share of it comes from a column of ones appended to v, or, of weights that are
exponentials themselves, as a logarithm from the structure. With a small c, or s = 0, the layer starts as window + sinks.

Shapes: B batch, T queries, S keys, H linear query heads, J linear key/value heads, K head dim, D hidden size.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.mixer import NEVER, RecurrentInputs, Site
from linearize.mixers.registry import build_mixer
from linearize.modeling.cache import Context, Step
from linearize.ops.chunks import state_dtype
from linearize.ops.window import Scores, single_query_attention, window_attention
from linearize.plan import MIX_OPTIONS, NO_BRANCH, LayerPlan

# without gradients long prefills go through in parts this long, so that intermediate arrays stay small; a device needs
# longer ones to be busy
SEGMENT, DEVICE_SEGMENT = 4096, 16384
NORM_EPSILON = 1e-6
UNFITTED = 6.0
# what `fit_mix` tries, the first being nothing
LOG_MASSES = (-20.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """Inside, new tensors are float32, whatever the model is loaded in: first values are the same everywhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_linear_heads(plan: LayerPlan, site: Site, hidden_size: int) -> "WindowHeads":
    """The linear heads that a layer's plan asks for."""
    return WindowHeads(plan, site) if plan.mixer == NO_BRANCH else LinearHeads(plan, site, hidden_size)


def build_softmax_window_heads(plan: LayerPlan, site: Site) -> "WindowHeads | None":
    """The softmax heads of a layer whose plan gives them a window; `site` is of the linear heads."""
    if plan.softmax_window is None or not plan.softmax_heads:
        return None
    return WindowHeads(replace(plan, window=plan.softmax_window), replace(site, heads=plan.softmax_heads))


class WindowHeads(nn.Module):
    """Softmax over a window and the sinks, and nothing else: softmax heads with a window, or linear heads without a
    recurrent branch. No parameters."""

    delayed = False
    shares: list[Tensor] | None = None

    def __init__(self, plan: LayerPlan, site: Site):
        super().__init__()
        self.site, self.window, self.sinks = site, plan.window, plan.sinks

    def state_shape(self) -> tuple[int, ...]:
        """Shape of one key/value head's recurrent state."""
        return (0,)

    def recurrent_input_bytes(self, width: int) -> int:
        """Return the bytes per token and key/value head that a window's cache stores as recurrent inputs, at `width` bytes
        per cached number."""
        return 0

    def recurrent_inputs(self, k: Tensor, hidden: Tensor) -> RecurrentInputs:
        """Return the inputs of the recurrent branch, from keys before rotary [B, T, J, K] and hidden states [B, T, D]."""
        return RecurrentInputs()

    def encoded(self, inputs: RecurrentInputs) -> RecurrentInputs:
        """Encode recurrent inputs for a cache."""
        return inputs

    def decoded(self, context: Context | Step, newest: RecurrentInputs) -> Context | Step:
        """Decode a cache's context. Its newest tokens take their inputs, and the gradients of these, from `newest`."""
        return context

    def forward(
        self, q: Tensor, q_rotary: Tensor, context: Context | Step, *, scores: Scores, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from the last T tokens of `context`.

        Args:
            q, q_rotary: [B, T, H, K] before and after rotary.
            context: the keys and values in reach (modeling/cache.py).
            scores: how the window's scores are made.
            state: the recurrent state before the first of these tokens, or None.

        Returns:
            output [B, T, H, K] in q's dtype, the recurrent state after the last token.
        """
        T, cached = q.shape[1], context.length - q.shape[1]
        longest = SEGMENT if q.device.type == "cpu" else DEVICE_SEGMENT
        if longest >= T or torch.is_grad_enabled():
            return self._attend(q, q_rotary, context, scores, state)
        outputs = []
        for start in range(0, T, longest):
            end = min(start + longest, T)
            part = context.part(max(0, cached + start - self.window), cached + end)
            if start and state is not None and context.segments is not None:
                goes_on = context.segments[:, cached + start] == context.segments[:, cached + start - 1]
                state = state * goes_on.to(state.dtype).view(-1, *(1,) * (state.dim() - 1))
            output, state = self._attend(q[:, start:end], q_rotary[:, start:end], part, scores, state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    def _attend(
        self, q: Tensor, q_rotary: Tensor, context: Context | Step, scores: Scores, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self._window(q_rotary, context, scores)[0], state

    def _window(
        self, q: Tensor, context: Context | Step, scores: Scores, with_log_sum: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The softmax window's output [B, T, H, K] and, if asked for, log sum_j exp(score_j), [B, T, H, 1]."""
        if isinstance(context, Step):
            return single_query_attention(q, context.keys, context.values, with_log_sum=with_log_sum, **vars(scores))
        sinks = {}
        if context.sink_keys is not None and context.end > self.window:
            sinks = {
                "sink_keys": context.sink_keys,
                "sink_values": context.sink_values,
                "sink_mask": None
                if context.sees_all_sinks(q.shape[1], self.window)
                else context.sink_mask(q.shape[1], self.window),
            }
        return window_attention(
            q,
            context.keys,
            context.values,
            window=self.window,
            key_mask=context.key_mask,
            segments=context.segments,
            with_log_sum=with_log_sum,
            **vars(scores),
            **sinks,
        )


class LinearHeads(WindowHeads):
    """Window, recurrent branch and their mix. Its parameters are all that a conversion adds to a layer.

    `recurrent_enabled = False` leaves window + sinks alone, the training-free baseline; `window_enabled = False` the
    recurrent branch. While `shares` is a list, every forward adds the recurrent part's share of the output's norm, [H].
    """

    @_float32()
    def __init__(self, plan: LayerPlan, site: Site, hidden_size: int):
        super().__init__(plan, site)
        self.mix = plan.mix
        self.mix_options = {**MIX_OPTIONS[plan.mix], **plan.mix_options}
        self.structure = build_mixer(plan.mixer, site, plan.mixer_options)
        self.recurrent_enabled = self.window_enabled = True
        # a structure that has yet to be fitted starts with next to no mass, unless somebody says otherwise
        self.unfitted_penalty = (
            UNFITTED if self.structure.starts_unfitted and "log_mass" not in plan.mix_options else 0.0
        )
        query_heads = len(site.heads) * site.group
        # one normaliser for window and past
        self.shared = self.delayed and self.structure.positive
        for name, shape in {
            "log_mass": (query_heads,) if self.shared else None,
            "branch_scale": (query_heads,) if self.delayed and not self.shared else None,
            "branch_weights": (2, query_heads) if self.mix == "sum" and self.mix_options["learned"] else None,
            "gate_projection": (len(site.heads) * self.structure.gate_width(), hidden_size)
            if plan.gate == "learned"
            else None,
        }.items():
            parameter = nn.Parameter(torch.empty(shape)) if shape else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @property
    def delayed(self) -> bool:
        """Whether the recurrent branch waits for tokens to leave the window."""
        return self.mix != "sum"

    @_float32()
    @torch.no_grad()
    def reset_parameters(self) -> None:
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
        return self.structure.state_shape(self.site.head_dim + self._counts_weights)

    @property
    def _counts_weights(self) -> bool:
        """Whether a column of ones beside the values counts the sum of the weights."""
        return not self.structure.log_normaliser and (self.shared or self.structure.normalization == "sum")

    def recurrent_input_bytes(self, width: int) -> int:
        if not self.delayed:
            return 0
        if self.structure.rotary:
            return self.structure.assignment_bytes()
        if self.gate_projection is None:
            return width * self.site.head_dim
        return 4 * (self.site.head_dim + self.structure.gate_width())  # key and gate logits in float32

    def recurrent_inputs(self, k: Tensor, hidden: Tensor) -> RecurrentInputs:
        if self.structure.rotary:
            if not self.structure.assigns:
                return RecurrentInputs()
            _require_in_memory(next(self.structure.parameters()))
            with torch.autocast(k.device.type, enabled=False):
                return RecurrentInputs(assignment=self.structure.assign(k))
        if self.gate_projection is None:
            return RecurrentInputs(keys=k)
        _require_in_memory(self.gate_projection)
        dtype = state_dtype(hidden)
        with torch.autocast(k.device.type, enabled=False):
            offset = F.linear(hidden.to(dtype), self.gate_projection.to(dtype)).unflatten(-1, (k.shape[2], -1))
        return RecurrentInputs(keys=k.to(dtype), gate_offset=offset)

    def encoded(self, inputs: RecurrentInputs) -> RecurrentInputs:
        if inputs.assignment is None:
            return inputs
        return inputs._replace(assignment=self.structure.encode_assignment(inputs.assignment))

    def decoded(self, context: Context | Step, newest: RecurrentInputs) -> Context | Step:
        if newest.assignment is None:
            return context
        new = newest.assignment

        def decode(encoded: Tensor) -> Tensor:
            return self.structure.decode_assignment(encoded, new.dtype)

        if isinstance(context, Step):
            arriving = context.arriving._replace(recurrent_inputs=newest)
            leaving = context.leaving._replace(recurrent_inputs=context.leaving.recurrent_inputs.map(decode))
            return replace(context, arriving=arriving, leaving=leaving)
        cached = context.recurrent_inputs.assignment[:, : -new.shape[1]]
        assignment = torch.cat([decode(cached), new], dim=1) if cached.shape[1] else new
        return replace(context, recurrent_inputs=RecurrentInputs(assignment=assignment))

    def _attend(
        self, q: Tensor, q_rotary: Tensor, context: Context | Step, scores: Scores, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.recurrent_enabled:
            return super()._attend(q, q_rotary, context, scores, state)
        windowed, log_sum = self._window(q_rotary, context, scores, with_log_sum=self.mix == "joint")
        queries = q_rotary if self.structure.rotary else q
        if self.mix == "sum":
            recurrent, state = self._recurrent(queries, context, state, start=0, delay=0)
            weights = self._branch_weights(windowed)
            return self._joined(weights[0] * windowed, weights[1] * recurrent).to(q.dtype), state
        # the first query with a token outside its window; before it the layer is the window alone
        start = max(0, self.window - (context.length - q.shape[1]))
        if start >= q.shape[1]:
            return windowed if self.window_enabled else torch.zeros_like(windowed), state
        past, state = self._recurrent(queries, context, state, start=start, delay=self.window)
        early, late = windowed.split([start, q.shape[1] - start], dim=1)
        mixed = self._mixed(late, None if log_sum is None else log_sum[:, start:], past)
        early = early if self.window_enabled else torch.zeros_like(early)
        return torch.cat([early, mixed.to(q.dtype)], dim=1), state

    def _mixed(self, windowed: Tensor, log_sum: Tensor | None, past: Tensor) -> Tensor:
        """Window [B, T, H, K] and delayed recurrence [B, T, H, V] as one output [B, T, H, K]."""
        if not self.shared:
            return self._joined(windowed, self.branch_scale[:, None] * _rms_norm(past))
        values, log_count = self._normalised(past)
        # the past's weight over the window's, whose sum is one where it is not that of the base model's own exponentials
        odds = self.log_mass[:, None] + log_count - (0.0 if log_sum is None else log_sum)
        if not self.window_enabled:
            return self._joined(torch.zeros_like(windowed), values)
        # the smaller share has all of the gradient's digits, of which one minus it keeps few
        past_is_less = odds < 0
        less = torch.where(past_is_less, odds, -odds).sigmoid()
        more = 1 - less
        of_window, of_past = torch.where(past_is_less, more, less), torch.where(past_is_less, less, more)
        return self._joined(of_window * windowed, of_past * values)

    def _normalised(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """What a structure with positive weights read, [B, T, H, K], and the logarithm of its weights' sum, [B, T, H, 1]."""
        values, total = past.split([past.shape[-1] - 1, 1], dim=-1)
        if self.structure.log_normaliser:
            return values, total
        least = torch.finfo(total.dtype).tiny
        seen, total = total > least, total.clamp(min=least)
        return values / total, torch.where(seen, total.log(), NEVER)

    @torch.no_grad()
    def fit_mix(
        self, q: Tensor, q_rotary: Tensor, context: Context, target: Tensor, scores: Scores, *, damping: float = 0.0
    ) -> list[Tensor]:
        """Sets how much the recurrent branch counts, per query head, so that the output is nearest to `target` and in no
        row further from it than window + sinks.

        Args:
            target: [B, T, H, K], the base model's own; T beyond the window. Others as in `forward`.
            damping: what the log mass stays below the best.

        Returns:
            Square errors [H] over the tokens beyond the window, relative to `target` row by row: of window + sinks, and as fitted.
        """
        windowed, log_sum = self._window(q_rotary, context, scores, with_log_sum=self.mix == "joint")
        start = 0 if self.mix == "sum" else self.window
        queries = q_rotary if self.structure.rotary else q
        past, _ = self._recurrent(queries, context, None, start=start, delay=start)
        near, target = windowed[:, start:].float(), target[:, start:].float()
        log_sum = None if log_sum is None else log_sum[:, start:]
        total = target.square().sum((1, 3)).clamp(min=NORM_EPSILON)

        def error(output: Tensor) -> Tensor:
            return (output - target).square().sum((1, 3)) / total

        alone = error(near)  # [B, H]
        if self.log_mass is not None:
            errors = []
            for value in LOG_MASSES:
                self.log_mass.fill_(value)
                errors.append(error(self._mixed(near, log_sum, past)))
            worse = (torch.stack(errors) > alone).any(1)  # in some row
            worse[0] = False
            least = torch.stack(errors).mean(1).masked_fill(worse, float("inf")).min(dim=0)
            best = torch.tensor(LOG_MASSES, device=near.device)[least.indices]
            self.log_mass.copy_(best - damping)
            return [alone.mean(0), error(self._mixed(near, log_sum, past)).mean(0)]
        if self.branch_scale is not None:
            normed = _rms_norm(past)
            cross, power = ((x * normed).sum((0, 1, 3)) for x in (target - near, normed))
            self.branch_scale.copy_(cross / power.clamp(min=NORM_EPSILON))
            worse = (error(self._mixed(near, None, past)) > alone).any(0)
            self.branch_scale.masked_fill_(worse, 0.0)
            return [alone.mean(0), error(self._mixed(near, None, past)).mean(0)]
        if self.branch_weights is not None:
            parts = torch.stack([near, past], dim=-1).permute(2, 0, 1, 3, 4).flatten(1, 3)  # [H, N, 2]
            wanted = target.permute(2, 0, 1, 3).flatten(1)[..., None]
            self.branch_weights.copy_(torch.linalg.lstsq(parts, wanted).solution[..., 0].T)
        weights = self._branch_weights(near)
        return [alone.mean(0), error(weights[0] * near + weights[1] * past).mean(0)]

    @property
    def scalable(self) -> bool:
        """Whether one factor makes the recurrent branch count less."""
        return self.log_mass is not None or self.branch_scale is not None

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies how much the recurrent branch counts."""
        if self.log_mass is not None:
            self.log_mass += math.log(factor)
        if self.branch_scale is not None:
            self.branch_scale *= factor

    def _joined(self, window: Tensor, recurrent: Tensor) -> Tensor:
        """The sum of the two parts [B, T, H, K]."""
        if self.shares is not None:
            parts = [part.float().norm(dim=-1).mean((0, 1)) for part in (window, recurrent)]
            self.shares.append(parts[1] / (parts[0] + parts[1]).clamp(min=NORM_EPSILON))
        return window + recurrent if self.window_enabled else recurrent

    def _recurrent(
        self, q: Tensor, context: Context | Step, state: Tensor | None, *, start: int, delay: int
    ) -> tuple[Tensor, Tensor]:
        """Runs the structure for queries `start`.. on the tokens `delay` before them."""
        count = q.shape[1] - start
        dtype = state_dtype(q)
        read = context.behind(count, delay)
        keys, gate_offset, assignment = read.recurrent_inputs
        keys = read.keys if keys is None else keys
        values = read.values.to(dtype)
        if self._counts_weights:
            values = F.pad(values, (0, 1), value=1.0)
        write_mask = segments = None
        if self.delayed:
            if not context.is_plain or context.end - delay - count < self.sinks:
                write_mask = read.ordinals >= self.sinks
        elif read.key_mask is not None:
            write_mask = read.key_mask
        if read.segments is not None:
            segments = context.behind(count, 0).segments
            same = read.segments == segments
            write_mask = same if write_mask is None else write_mask & same
        run = self.structure.naive if count == 1 else self.structure
        # autocast does not reach inside: states and the sums they hold stay float32
        with torch.autocast(q.device.type, enabled=False):
            output, state = run(
                q[:, start:].to(dtype),
                keys.to(dtype),
                values,
                gate_offset=gate_offset,
                assignment=assignment,
                write_mask=write_mask,
                initial_state=state,
                segments=segments,
            )
        if not self.shared and self.structure.normalization == "sum":
            total = 1.0 if self.structure.log_normaliser else output[..., -1:] + NORM_EPSILON
            output = output[..., :-1] / total
        if self.mix == "sum" and self.structure.normalization == "rms":
            output = _rms_norm(output)
        return output, state

    def _branch_weights(self, like: Tensor) -> Tensor:
        """[2, H, 1]: the weights of window and recurrent branch."""
        if self.mix_options["learned"]:
            return self.branch_weights[..., None]
        pair = [self.mix_options["window_weight"], self.mix_options["recurrent_weight"]]
        return torch.tensor(pair, device=like.device)[:, None, None]


def _require_in_memory(parameter: Tensor) -> None:
    if parameter.is_meta:
        raise RuntimeError(
            "the added parameters of a linearized model (`mixer`) have to stay in memory; give a device_map that offloads "
            "none of its layers"
        )


def _rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON)
