"""Softmax attention together with its normaliser, which `scaled_dot_product_attention` keeps to itself.

Shapes: N blocks, J key/value heads, R query rows, S keys, K head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.chunks import state_dtype


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and log sum_j exp(score_j), by PyTorch's fused kernel where it hands the latter out.

    Args:
        q: [N, J, R, K]. k, v: [N, J, S, K]. mask: [N, 1, R, S] bool; every row sees a key.
        scale, softcap: see `Scores` (ops/window.py).

    Returns:
        output [N, J, R, K] in v's dtype, and [N, J, R, 1], float32 or float64.
    """
    if fuses(q, softcap) and q.dtype == k.dtype == v.dtype and k.shape == v.shape:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        output, log_sum = _FusedAttention.apply(*(F.pad(x, (0, 1)) for x in (q, k, v)), bias, scale)
        return output[..., :-1], log_sum[..., None]
    return softmax_attention_naive(q, k, v, mask, scale=scale, softcap=softcap)


def fuses(q: Tensor, softcap: float | None) -> bool:
    """Whether a kernel computes this without keeping a score matrix."""
    return softcap is None and q.device.type == "cpu"


def softmax_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same with a full score matrix. Arguments as `softmax_attention`."""
    scores = (q @ k.transpose(-1, -2) * scale).to(state_dtype(q))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    log_sum = scores.logsumexp(-1, keepdim=True)
    return (scores - log_sum).exp().to(v.dtype) @ v, log_sum


class _FusedAttention(torch.autograd.Function):
    """Gradients reach the scores from the output and from the normaliser: ds_j = p_j (do.v_j - do.o + dlog_sum).

    The kernel's backward knows the output's alone, and subtracts do.o as it finds it. So q, k and v come with a last
    column of zeros, and going back that column holds 1 in do and -dlog_sum in o.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sum = kernel(q, k, v, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, bias, output, log_sum)
        ctx.scale = scale
        return output, log_sum

    @staticmethod
    def backward(ctx, d_output, d_log_sum):
        q, k, v, bias, output, log_sum = ctx.saved_tensors
        d_output, output = d_output.clone(), output.clone()
        d_output[..., -1], output[..., -1] = 1.0, -d_log_sum
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = kernel(d_output, q, k, v, output, log_sum, 0.0, False, attn_mask=bias, scale=ctx.scale)
        return (*gradients, None, None)
