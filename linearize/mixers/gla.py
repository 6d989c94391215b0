"""Liger GLA: gated linear attention whose gate is the key projection itself.

    log_decay_t = logsigmoid(p_t) / 16,  S_t = diag(exp(log_decay_t)) S_{t-1} + softmax(k_t) v_t^T,
    o_t = S_t^T softmax(q_t),  p_t = k_t

with q and k before rotary. Sources: Liger, arXiv 2503.01496, Table 1 (the pooling of its released code is the
identity); GLA, arXiv 2312.06635, equations 3 and 4.
"""

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site, outer, read_state
from linearize.ops.gla import gla


class GatedLinearAttention(Mixer):
    """S_t = diag(exp(log_decay_t)) S_{t-1} + softmax(k_t) v_t^T,  o_t = S_t^T softmax(q_t)

    One decay per key channel.

    Args:
        gate_logit_normalizer: divisor of the log-decay; 16 in GLA and Liger. A larger one remembers longer.
    """

    def __init__(self, site: Site, gate_logit_normalizer: float = 16.0):
        super().__init__(site)
        self.gate_logit_normalizer = gate_logit_normalizer

    def update(self, state: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        decay = (F.logsigmoid(logits) / self.gate_logit_normalizer).exp()
        return decay.unsqueeze(-1) * state + outer(k.softmax(-1), v)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read_state(after, q.softmax(-1))

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        log_decay = F.logsigmoid(logits) / self.gate_logit_normalizer
        write, log_decay = scan.mask_writes(k.softmax(-1), log_decay)
        return gla(q.softmax(-1), write, v, log_decay, initial_state=scan.initial_state, segments=scan.segments)
