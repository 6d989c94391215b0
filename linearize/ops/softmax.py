"""Softmax attention together with its log sum, which `scaled_dot_product_attention` does not return.

The log sum is log sum_j exp(score_j), the logarithm of the softmax's normaliser.

Shapes: N blocks of queries, J key/value heads, R rows (each a query of one query head), S keys, K head dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.chunks import state_dtype


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log sum.

    A fused kernel of PyTorch computes both where there is one for these inputs, otherwise `softmax_attention_naive`.

    Args:
        q: [N, J, R, K]. k, v: [N, J, S, K].
        bias: [N, 1, R, S] in q's dtype, 0 or -inf, added to the scores; None for zero. Every row must see a key.
        scale, softcap: see `Scores` (ops/window.py).
        causal: hide from row r the keys after the r-th. Requires R = S.

    Returns:
        output [N, J, R, K] in v's dtype, and the log sum [N, J, R, 1] in float32 or float64.
    """
    if fuses(q, softcap) and q.dtype == k.dtype == v.dtype and k.shape == v.shape:
        if q.is_cuda and bias is not None:  # CUDA's kernel does not broadcast the bias over heads
            bias = bias.expand(-1, q.shape[1], -1, -1)
        attend = _FusedAttention.apply if torch.is_grad_enabled() else _fused
        output, log_sum, *_ = attend(q, k, v, bias, scale, causal)
        # CUDA's kernel pads the log sum beyond R rows
        return output, log_sum[..., : q.shape[2], None]
    if causal:  # -inf above the diagonal
        triangle = torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        bias = triangle if bias is None else bias + triangle
    return softmax_attention_naive(q, k, v, bias, scale=scale, softcap=softcap)


def fuses(q: Tensor, softcap: float | None) -> bool:
    """Return True if a fused kernel takes such queries and scores, so that no score matrix is stored."""
    # the divisor in `_with_log_sum_gradient` underflows in float16
    if softcap is not None or q.dtype == torch.float16:
        return False
    # CUDA's kernel loads whole vectors of a head, and knows no float64
    return q.device.type == "cpu" or (q.is_cuda and q.dtype != torch.float64 and q.shape[-1] % 8 == 0)


def softmax_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `softmax_attention` with a full score matrix; a causal mask is part of the bias."""
    if q.dtype == torch.float16:  # scores before scaling can overflow float16
        q, k = q.float(), k.float()
    scores = (q @ k.transpose(-1, -2) * scale).to(state_dtype(q))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    log_sum = scores.logsumexp(-1, keepdim=True)
    return (scores - log_sum).exp().to(v.dtype) @ v, log_sum


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, ...]:
    """Return output, log sum [N, J, R or more], and the random state that CUDA's backward needs."""
    if not q.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, is_causal=causal, attn_mask=bias, scale=scale)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)


class _FusedAttention(torch.autograd.Function):
    """Compute attention whose gradients also come through the log sum: ds_j = p_j (do.v_j - do.o + dlog_sum).

    The kernel's backward knows the output's gradient do alone, and subtracts do.o. So it gets, in place of o, the
    nearest vector whose product with do is do.o - dlog_sum.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        output, log_sum, *random = _fused(q, k, v, bias, scale, causal)
        ctx.save_for_backward(q, k, v, bias, output, log_sum, *random)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        return output, log_sum[..., : q.shape[2]]  # as long as its gradient will be

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_log_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, output, log_sum, *random = ctx.saved_tensors
        shifted = output
        if d_output is None:
            d_output = torch.zeros_like(output)
        if d_log_sum is not None and (d_log_sum.is_cuda or d_log_sum.any()):
            d_output, shifted = _with_log_sum_gradient(output, d_output, d_log_sum)
        if q.is_cuda:
            needs_gradient = [True, True, True, False]
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention_backward
            inputs = (d_output, q, k, v, bias, shifted, log_sum, *random)
            *gradients, _ = kernel(*inputs, 0.0, needs_gradient, ctx.causal, scale=ctx.scale)
            return (*gradients, None, None, None)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = kernel(d_output, q, k, v, shifted, log_sum, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale)
        return (*gradients, None, None, None)


def _with_log_sum_gradient(output: Tensor, d_output: Tensor, d_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Return do and o - (dlog_sum / do.do) do. A do too small to divide by becomes one that changes no gradient."""
    wide = d_output.to(d_log_sum.dtype)
    energy = wide.square().sum(-1)
    # its square, and 1 over that, are normal numbers
    tiny = torch.finfo(energy.dtype).tiny ** 0.4
    lost = energy < tiny**2
    if lost.is_cuda or lost.any():  # reading a device's tensor waits for the device
        stand_in = F.pad(wide.new_full((1,), tiny), (0, wide.shape[-1] - 1))
        wide = torch.where(lost[..., None], stand_in, wide)
        energy = torch.where(lost, tiny**2, energy)
    shifted = output - (d_log_sum / energy)[..., None] * wide
    return wide.to(d_output.dtype), shifted.to(output.dtype)
