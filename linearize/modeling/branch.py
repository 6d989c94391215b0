"""The linear heads of one layer: a softmax window with sinks, a recurrent branch, and the way the two are mixed.

    sum      o = w_window * window + w_recurrent * recurrent     (Liger attention, arXiv 2503.01496; 0.5 and 0.5)
    outside  o = (sum_window p_j v_j + c sum_past f_j v_j) / (sum_window p_j + c sum_past f_j)

In `outside` the recurrent branch sees only tokens that have left the window (RAttention, arXiv 2506.15545): it is the
same causal operator run on keys, values and gates delayed by the window, sinks left out. p are the window's softmax
weights (they sum to one), f_j = feature(q) . feature(k_j) times the decay since j, and c = exp(log_mass), one learned
number per query head: window and past share one normaliser, counted in units of the window's own mass. The past's
share of it comes from a column of ones appended to v. With a small c the layer starts as window + sinks.

Shapes: B batch, T queries, S keys, H linear query heads, J linear key/value heads, K head dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.registry import mixer_class
from linearize.modeling.cache import Context
from linearize.modeling.plan import MIX_OPTIONS, LayerPlan
from linearize.ops.window import window_attention

# without gradients long prefills go through in parts this long, so that intermediate arrays stay small
SEGMENT = 4096


class LinearHeads(nn.Module):
    """Window, recurrent branch and their mix. Its parameters are all that a conversion adds to a layer.

    `recurrent_enabled = False` leaves window + sinks alone, the training-free baseline.
    """

    def __init__(self, plan: LayerPlan, query_heads: int):
        super().__init__()
        self.window, self.sinks, self.mix = plan.window, plan.sinks, plan.mix
        self.mix_options = {**MIX_OPTIONS[plan.mix], **plan.mix_options}
        self.structure = mixer_class(plan.mixer)(**plan.mixer_options)
        self.recurrent_enabled = True
        if self.mix == "outside":
            self.log_mass = nn.Parameter(torch.empty(query_heads, dtype=torch.float32))
        elif self.mix_options["learned"]:
            self.branch_weights = nn.Parameter(torch.empty(2, query_heads, dtype=torch.float32))
        self.reset_parameters()

    @property
    def delayed(self) -> bool:
        """Whether the recurrent branch waits for tokens to leave the window."""
        return self.mix == "outside"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.mix == "outside":
            self.log_mass.fill_(self.mix_options["log_mass"])
        elif self.mix_options["learned"]:
            self.branch_weights[0].fill_(self.mix_options["window_weight"])
            self.branch_weights[1].fill_(self.mix_options["recurrent_weight"])

    def forward(
        self, q: Tensor, q_rotary: Tensor, context: Context, *, scale: float, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from the last T tokens of `context`.

        Args:
            q, q_rotary: [B, T, H, K] before and after rotary.
            context: the keys and values in reach (modeling/cache.py).
            scale: of the window's scores.
            state: the recurrent state before the first of these tokens, or None.

        Returns:
            output [B, T, H, K] in q's dtype, the recurrent state after the last token.
        """
        T, cached = q.shape[1], context.length - q.shape[1]
        if T <= SEGMENT or torch.is_grad_enabled():
            return self._attend(q, q_rotary, context, scale, state)
        outputs = []
        for start in range(0, T, SEGMENT):
            end = min(start + SEGMENT, T)
            part = context.part(max(0, cached + start - self.window), cached + end)
            output, state = self._attend(q[:, start:end], q_rotary[:, start:end], part, scale, state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    def _attend(
        self, q: Tensor, q_rotary: Tensor, context: Context, scale: float, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        windowed = self._window(q_rotary, context, scale)
        if not self.recurrent_enabled:
            return windowed, state
        if self.mix == "sum":
            recurrent, state = self._recurrent(q, context, state, start=0, delay=0)
            weights = self._branch_weights(windowed)
            return (weights[0] * windowed + weights[1] * recurrent).to(q.dtype), state
        # the first query with a token outside its window; before it the layer is the window alone
        start = max(0, self.window - (context.length - q.shape[1]))
        if start >= q.shape[1]:
            return windowed, state
        past, state = self._recurrent(q, context, state, start=start, delay=self.window)
        mass = self.log_mass.exp()[:, None]
        numerator, normaliser = mass * past[..., :-1], mass * past[..., -1:]
        mixed = (windowed[:, start:] + numerator) / (1.0 + normaliser)
        return torch.cat([windowed[:, :start], mixed.to(q.dtype)], dim=1), state

    def _window(self, q: Tensor, context: Context, scale: float) -> Tensor:
        sinks = {}
        if context.sink_keys is not None and context.length + context.first_slot > self.window:
            sinks = {
                "sink_keys": context.sink_keys,
                "sink_values": context.sink_values,
                "sink_mask": context.sink_mask(q.shape[1], self.window),
            }
        return window_attention(
            q,
            context.keys,
            context.values,
            window=self.window,
            scale=scale,
            key_mask=context.key_mask,
            segments=context.segments,
            **sinks,
        )

    def _recurrent(
        self, q: Tensor, context: Context, state: Tensor | None, *, start: int, delay: int
    ) -> tuple[Tensor, Tensor]:
        """Runs the structure for queries `start`.. on the tokens `delay` before them."""
        count = q.shape[1] - start
        values = _ending(context.values, count, delay)
        write_mask = segments = None
        if self.delayed:
            values = F.pad(values, (0, 1), value=1.0)
            write_mask = _ending(context.ordinals, count, delay) >= self.sinks
        elif context.key_mask is not None:
            write_mask = _ending(context.key_mask, count, delay)
        if context.segments is not None:
            segments = _ending(context.segments, count, 0)
            same = _ending(context.segments, count, delay) == segments
            write_mask = same if write_mask is None else write_mask & same
        return self.structure(
            q[:, start:],
            _ending(context.raw_keys, count, delay),
            values,
            write_mask=write_mask,
            initial_state=state,
            segments=segments,
        )

    def _branch_weights(self, like: Tensor) -> Tensor:
        """[2, H, 1]: the weights of window and recurrent branch."""
        if self.mix_options["learned"]:
            return self.branch_weights[..., None]
        pair = [self.mix_options["window_weight"], self.mix_options["recurrent_weight"]]
        return torch.tensor(pair, device=like.device)[:, None, None]


def _ending(x: Tensor, count: int, skip: int) -> Tensor:
    """The `count` slots that end `skip` before the last."""
    end = x.shape[1] - skip
    return x[:, end - count : end]
