"""RWKV-7 (Goose): a generalised delta rule whose write strength differs from channel to channel.

    S_t = (diag(w_t) - (a_t * u_t) u_t^T) S_{t-1} + (a_t * k_t) v_t^T,  o_t = S_t^T q_t
    w_t = exp(-exp(-1/2) sigmoid(p_t)), a_t = sigmoid(p_t) per channel,  p_t = k_t,  u_t = k_t / |k_t|

Source: RWKV-7, arXiv 2503.14456, equations 12 to 17, its state transposed; the removal key and the replacement key are
both the key projection (the paper's learned xi and alpha at 1).
"""

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.delta_rule import delta_rule

# exp(-1/2): no channel loses more than 45% a token, so that dividing by the decay is safe
FASTEST = 0.6065306597126334
SMALLEST_NORM = 1e-12


class RWKV7(Mixer):
    """One decay and one write strength per key channel."""

    normalization = "rms"

    def update(self, state, k, v, decay_logits, strength_logits):
        decay, strength = (-FASTEST * decay_logits.sigmoid()).exp(), strength_logits.sigmoid()
        unit = k / (k.square().sum(-1, keepdim=True) + SMALLEST_NORM).sqrt()
        held = (unit.unsqueeze(-2) @ state).squeeze(-2)
        return decay.unsqueeze(-1) * state - outer(strength * unit, held) + outer(strength * k, v)

    def read(self, before, after, q, k, v):
        return read_state(after, q)

    def chunked(self, q, k, v, decay_logits, strength_logits, scan: Scan):
        log_decay = -FASTEST * decay_logits.sigmoid()
        # a u (u . S) = (a k) ((k / |k|^2 / w) . diag(w) S): the delta rule with an erase key of its own
        erase = k / (k.square().sum(-1, keepdim=True) + SMALLEST_NORM) * (-log_decay).exp()
        strength, log_decay = scan.mask_writes(strength_logits.sigmoid(), log_decay)
        return delta_rule(
            q, k, v, strength, log_decay, erase=erase, initial_state=scan.initial_state, segments=scan.segments
        )
