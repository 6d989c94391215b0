"""Heads of one layer that attend with softmax to a window and the sinks.

Shapes: B batch, T queries, S keys, H query heads, J key/value heads, K head dim, D hidden size.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from linearize.mixers.mixer import RecurrentInputs, Site
from linearize.modeling.context import Context, Step
from linearize.ops.window import Scores, single_query_attention, window_attention
from linearize.plan import LayerPlan

# tokens of one part of a prefill without gradients, on a CPU and on other devices: short enough that intermediate
# arrays stay small, long enough that a device is busy
PREFILL_PART, DEVICE_PREFILL_PART = 4096, 16384


class WindowHeads(nn.Module):
    """Softmax attention over a window and the sinks. No parameters.

    A layer's softmax heads are of this class if they have a window, its linear heads if they have no recurrent branch.

    Attributes:
        site: the heads' place in the model.
        window: keys that a query sees, its own included.
        sinks: number of first tokens that stay visible after they have left the window.
        delayed: true if a recurrent branch waits for tokens to leave the window.
        shares: a list, or None. While it is a list, every forward of heads with a recurrent branch appends the branch's
            share of the output, [H].
    """

    delayed = False
    shares: list[Tensor] | None = None

    def __init__(self, plan: LayerPlan, site: Site):
        super().__init__()
        self.site, self.window, self.sinks = site, plan.window, plan.sinks

    def state_shape(self) -> tuple[int, ...]:
        """Return the shape of one key/value head's recurrent state."""
        return (0,)

    def recurrent_input_bytes(self, width: int) -> int:
        """Return the bytes per token and key/value head that a window's cache stores as recurrent inputs.

        Args:
            width: bytes per cached number.
        """
        return 0

    def recurrent_inputs(self, k: Tensor, hidden: Tensor) -> RecurrentInputs:
        """Return the recurrent branch's inputs, from keys before rotary [B, T, J, K] and hidden states [B, T, D]."""
        return RecurrentInputs()

    def encode_inputs(self, inputs: RecurrentInputs) -> RecurrentInputs:
        """Encode recurrent inputs for a cache."""
        return inputs

    def decode_context(self, context: Context | Step, newest: RecurrentInputs) -> Context | Step:
        """Decode a cache's context. Its newest tokens take their inputs, and the gradients of these, from `newest`."""
        return context

    def forward(
        self, q: Tensor, q_rotary: Tensor, context: Context | Step, *, scores: Scores, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the last T tokens of `context`. A long prefill without gradients goes part by part.

        Args:
            q, q_rotary: queries [B, T, H, K] before and after rotary.
            context: the keys and values in reach.
            scores: the scale and the other settings of the scores.
            state: the recurrent state before the first of these tokens; None without a recurrent branch or at the
                start of a sequence.

        Returns:
            output [B, T, H, K] in q's dtype, the recurrent state after the last token.
        """
        T = q.shape[1]
        cached = context.length - T  # slots before the first query
        longest = PREFILL_PART if q.device.type == "cpu" else DEVICE_PREFILL_PART
        if isinstance(context, Step) or longest >= T or torch.is_grad_enabled():
            return self.attend(q, q_rotary, context, scores, state)
        outputs = []
        for start in range(0, T, longest):
            end = min(start + longest, T)
            first = cached + start  # the slot of the part's first query
            # from the slot that has just left the first query's window, since a delayed branch reads it
            part = context.part(max(0, first - self.window), cached + end)
            if start and state is not None and context.segments is not None:
                # zero the state where a document begins; a mixer cannot see this at the first query of its scan
                same_document = context.segments[:, first] == context.segments[:, first - 1]
                per_row = (-1, *(1,) * (state.dim() - 1))  # [B] -> [B, 1, ...]
                state = state * same_document.to(state.dtype).view(per_row)
            output, state = self.attend(q[:, start:end], q_rotary[:, start:end], part, scores, state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    def attend(
        self, q: Tensor, q_rotary: Tensor, context: Context | Step, scores: Scores, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in one part; arguments and results as in `forward`."""
        return self.attend_window(q_rotary, context, scores)[0], state

    def attend_window(
        self, q: Tensor, context: Context | Step, scores: Scores, with_log_sum: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the softmax window's output [B, T, H, K] and, if asked for, log sum_j exp(score_j), [B, T, H, 1]."""
        if isinstance(context, Step):
            return single_query_attention(q, context.keys, context.values, with_log_sum=with_log_sum, **vars(scores))
        sink_keys = sink_values = sink_mask = None
        if context.sink_keys is not None and context.end > self.window:
            sink_keys, sink_values = context.sink_keys, context.sink_values
            if not context.sees_all_sinks(q.shape[1], self.window):
                sink_mask = context.sink_mask(q.shape[1], self.window)
        return window_attention(
            q,
            context.keys,
            context.values,
            window=self.window,
            key_mask=context.key_mask,
            segments=context.segments,
            sink_keys=sink_keys,
            sink_values=sink_values,
            sink_mask=sink_mask,
            with_log_sum=with_log_sum,
            **vars(scores),
        )


def build_softmax_window_heads(plan: LayerPlan, site: Site) -> WindowHeads | None:
    """Build the softmax heads of a layer if its plan gives them a window; `site` is that of the linear heads."""
    if plan.softmax_window is None or not plan.softmax_heads:
        return None
    return WindowHeads(replace(plan, window=plan.softmax_window), replace(site, heads=plan.softmax_heads))
