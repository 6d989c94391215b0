"""Liger GLA: gated linear attention whose gate is the key projection itself.

    log_decay_t = logsigmoid(k_t) / 16,  S_t = diag(exp(log_decay_t)) S_{t-1} + softmax(k_t) v_t^T,
    o_t = S_t^T softmax(q_t)

with q and k before rotary. Sources: Liger, arXiv 2503.01496, Table 1 (the pooling of its released code is the
identity, so p_t = k_t); GLA, arXiv 2312.06635, equations 3 and 4. It adds no parameters.

Shapes: B batch, T tokens, H query heads, J key/value heads, K head dim, V value dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.ops.gla import gla


class GatedLinearAttention(nn.Module):
    """The recurrence of one layer's linear heads. The features are positive, so a normaliser can be shared.

    Args:
        gate_logit_normalizer: divides the log-decay; 16 in GLA and Liger. A larger one remembers longer.
    """

    def __init__(self, gate_logit_normalizer: float = 16.0):
        super().__init__()
        self.gate_logit_normalizer = gate_logit_normalizer

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        write_mask: Tensor | None = None,
        initial_state: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reads every state with its query.

        Args:
            q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V].
            write_mask: [B, T] bool; where False the token neither writes nor decays the state.
            initial_state: [B, J, K, V] float32.
            segments: [B, T] document numbers; the state is zeroed where they change.

        Returns:
            output [B, T, H, V] float32, final state [B, J, K, V] float32.
        """
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        read, write = q.to(dtype).softmax(-1), k.to(dtype).softmax(-1)
        log_decay = F.logsigmoid(k.to(dtype)) / self.gate_logit_normalizer
        if write_mask is not None:
            write = write * write_mask[:, :, None, None]
            log_decay = log_decay * write_mask[:, :, None, None]
        return gla(read, write, v.to(dtype), log_decay, initial_state=initial_state, segments=segments)
