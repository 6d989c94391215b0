"""mLSTM: an exponential input gate, a sigmoid forget gate, and a normaliser of at least one.

    i_t = exp(p_t),  f_t = sigmoid(p_t),  p_t = mean of k_t,  k'_t = k_t / sqrt(K)
    C_t = f_t C_{t-1} + i_t k'_t v_t^T,  n_t = f_t n_{t-1} + i_t k'_t,  o_t = C_t^T q_t / max(|n_t . q_t|, 1)

Sources: Liger, arXiv 2503.01496, Table 1; xLSTM, arXiv 2405.04517, equations 19 to 27. As there, C and n are stored
divided by exp(m_t), with the stabiliser m_t = max(log f_t + m_{t-1}, log i_t), so that i_t cannot overflow. It cancels
in every output, so no gradient flows through it.
The state is [K, V + 2]: C, n, and m in the first row of the last column.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, outer, with_one
from linearize.ops.simple_gla import simple_gla

# log forget gate at a document border: it forgets everything before, and float64 sums keep their digits
BORDER = -1e6


class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k'_t v_t^T,  n_t = f_t n_{t-1} + i_t k'_t,  o_t = C_t^T q_t / max(|n_t . q_t|, 1)

    One input and one forget gate per head.
    """

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (self.site.head_dim, value_dim + 2)

    def update(self, state: Tensor, k: Tensor, v: Tensor, input_logits: Tensor, forget_logits: Tensor) -> Tensor:
        memory, m = state[..., :-1], state[..., 0, -1:].detach()
        log_forget = F.logsigmoid(forget_logits)
        new_m = torch.maximum(log_forget + m, input_logits).detach()
        forget, write = (log_forget + m - new_m).exp(), (input_logits - new_m).exp()
        memory = forget.unsqueeze(-1) * memory + outer(write * k, with_one(v)) / self.site.head_dim**0.5
        return _packed(memory, new_m.squeeze(-1))

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _normalised(q @ after[..., :-1], after[..., 0, -1:, None])

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, input_logits: Tensor, forget_logits: Tensor, scan: Scan
    ) -> tuple[Tensor, Tensor]:
        log_input, log_forget = input_logits.squeeze(-1), F.logsigmoid(forget_logits.squeeze(-1))
        memory, m = None, torch.zeros_like(log_input[:, 0])
        if scan.initial_state is not None:
            memory, m = scan.initial_state[..., :-1], scan.initial_state[..., 0, -1]
        with torch.no_grad():
            stabiliser = _stabiliser(log_input, log_forget, m, scan.write_mask, scan.segments)
        before, after = stabiliser[:, :-1], stabiliser[:, 1:]
        log_keep, write = _at_most_zero(log_forget + before - after), _at_most_zero(log_input - after).exp()
        if scan.segments is not None:  # across a border the state is zeroed, so any finite decay will do
            log_keep = log_keep.clamp(min=-80.0)
        keys = write.unsqueeze(-1) * k / self.site.head_dim**0.5
        keys, log_keep = scan.mask_writes(keys, log_keep)
        output, memory = simple_gla(q, keys, with_one(v), log_keep, initial_state=memory, segments=scan.segments)
        floor = after.repeat_interleave(q.shape[2] // k.shape[2], dim=2).unsqueeze(-1)
        return _normalised(output, floor), _packed(memory, after[:, -1])


def _stabiliser(
    log_input: Tensor, log_forget: Tensor, m: Tensor, write_mask: Tensor | None, segments: Tensor | None
) -> Tensor:
    """Return m before the first token and after each, [B, 1 + T, J].

    With F_t the sum of log f up to t, m_t = F_t + max(m_0, max over j <= t of log i_j - F_j): a running maximum.

    Args:
        log_input, log_forget: log i and log f, [B, T, J].
        m: m_0, [B, J].
        write_mask, segments: see `Scan`.
    """
    dtype = log_input.dtype
    log_input, log_forget = log_input.double(), log_forget.double()
    if write_mask is not None:
        written = write_mask[..., None]
        log_input, log_forget = log_input.masked_fill(~written, float("-inf")), log_forget * written
    if segments is not None:
        border = segments[:, 1:] != segments[:, :-1]
        log_forget = log_forget.clone()
        log_forget[:, 1:] += BORDER * border[..., None]
        # a document starts from m = 0, as a state of zeros does
        start = torch.maximum(log_input, log_forget - BORDER)
        log_input = torch.where(F.pad(border, (1, 0))[..., None], start, log_input)
    total = log_forget.cumsum(1)
    peaks = torch.cat([m.double().unsqueeze(1), log_input - total], dim=1).cummax(1).values
    return (peaks + F.pad(total, (0, 0, 1, 0))).to(dtype)


def _at_most_zero(x: Tensor) -> Tensor:
    """Remove the rounding error above zero. A clamp would remove the gradient too."""
    return x - x.detach().clamp(min=0.0)


def _packed(memory: Tensor, m: Tensor) -> Tensor:
    """Join C and n [B, J, K, V + 1] and m [B, J] into a state [B, J, K, V + 2]."""
    column = torch.zeros_like(memory[..., :1])
    column[..., 0, 0] = m
    return torch.cat([memory, column], dim=-1)


def _normalised(output: Tensor, m: Tensor) -> Tensor:
    """Divide C^T q by max(|n . q|, 1), all stored divided by exp(m): [..., V + 1] -> [..., V]."""
    return output[..., :-1] / torch.maximum(output[..., -1:].abs(), (-m).exp())
