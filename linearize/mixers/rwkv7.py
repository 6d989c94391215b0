"""RWKV-7 (Goose): a generalised delta rule whose write strength differs from channel to channel.

    S_t = (diag(w_t) - (a_t * u_t) u_t^T) S_{t-1} + (a_t * k_t) v_t^T,  o_t = S_t^T q_t
    w_t = exp(-exp(-1/2) sigmoid(p_t)), a_t = sigmoid(p_t) per channel,  p_t = k_t,  u_t = k_t / |k_t|

Source: RWKV-7, arXiv 2503.14456, equations 12 to 17, its state transposed; the removal key and the replacement key are
both the key projection (the paper's learned xi and alpha at 1).
"""

from torch import Tensor

from linearize.mixers.mixer import Mixer, Scan, outer, read_state
from linearize.ops.delta_rule import delta_rule

# exp(-1/2): no channel loses more than 45% per token, so dividing by the decay is safe
FASTEST = 0.6065306597126334
# added to squared norms, so that a key of zeros has a direction
SMALLEST_NORM = 1e-12


class RWKV7(Mixer):
    """S_t = (diag(w_t) - (a_t * u_t) u_t^T) S_{t-1} + (a_t * k_t) v_t^T,  o_t = S_t^T q_t

    One decay and one write strength per key channel.
    """

    normalization = "rms"

    def update(self, state: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, strength_logits: Tensor) -> Tensor:
        decay, strength = (-FASTEST * decay_logits.sigmoid()).exp(), strength_logits.sigmoid()
        unit = k / (k.square().sum(-1, keepdim=True) + SMALLEST_NORM).sqrt()
        stored = (unit.unsqueeze(-2) @ state).squeeze(-2)
        return decay.unsqueeze(-1) * state - outer(strength * unit, stored) + outer(strength * k, v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q)

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, decay_logits: Tensor, strength_logits: Tensor, scan: Scan
    ) -> tuple[Tensor, Tensor]:
        log_decay = -FASTEST * decay_logits.sigmoid()
        # a u (u . S) = (a k) ((k / |k|^2 / w) . diag(w) S): the delta rule with an erase key of its own
        erase = k / (k.square().sum(-1, keepdim=True) + SMALLEST_NORM) * (-log_decay).exp()
        strength, log_decay = scan.mask_writes(strength_logits.sigmoid(), log_decay)
        return delta_rule(
            q, k, v, strength, log_decay, erase=erase, initial_state=scan.initial_state, segments=scan.segments
        )
