"""Losses over a large vocabulary, some tokens at a time.

Both take hidden states, never logits: logits exist for `chunk_tokens` tokens at once, and their gradient with respect to
the hidden states is formed in the same pass, so no [tokens, vocabulary] float32 array is ever made.

Shapes: N tokens, D hidden size, C vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.modeling.readout import Readout


def chunked_kl(
    student: Tensor,
    teacher: Tensor,
    student_head: Readout,
    teacher_head: Readout,
    weights: Tensor,
    chunk_tokens: int,
) -> Tensor:
    """Sum over tokens of weights * KL(teacher || student), in nats (forward KL; methods: arXiv 2410.10254, 2502.14458).

    Args:
        student, teacher: hidden states after the final norm, [N, D] (the teacher's D may differ).
        weights: [N], zero for positions that do not count.
    """
    head = student_head
    return _ChunkedLoss.apply(student, head.weight, head.bias, head, teacher, teacher_head, None, weights, chunk_tokens)


def chunked_cross_entropy(hidden: Tensor, head: Readout, targets: Tensor, weights: Tensor, chunk_tokens: int) -> Tensor:
    """Sum over tokens of weights * cross-entropy to `targets` [N], in nats. Other arguments as `chunked_kl`."""
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, None, None, targets, weights, chunk_tokens)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, teacher, teacher_head, targets, weights, chunk_tokens):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            token_weight = weights[rows].float()
            logits = head(hidden[rows])
            log_probs = F.log_softmax(logits, dim=-1)
            if targets is None:
                reference = F.log_softmax(teacher_head(teacher[rows]), dim=-1)
                probs = reference.exp()
                total += (token_weight * reference.sub_(log_probs).mul_(probs).sum(-1)).sum()
                d_logits = log_probs.exp_().sub_(probs)
            else:
                picked = targets[rows, None].clamp(min=0)
                total -= (token_weight * log_probs.gather(-1, picked)[:, 0]).sum()
                d_logits = log_probs.exp_().scatter_add_(-1, picked, -torch.ones_like(picked, dtype=log_probs.dtype))
            if head.softcap is not None:
                d_logits.mul_(1 - (logits / head.softcap).square())
            # per token, so it goes to what is small instead
            token_weight = (token_weight * head.scale)[:, None]
            if needs_hidden:
                d_hidden[rows] = token_weight * (d_logits.to(hidden.dtype) @ weight.to(hidden.dtype))
            if needs_weight:
                d_weight += d_logits.T @ (token_weight * hidden[rows].float())
            if needs_bias:
                d_bias += (token_weight * d_logits).sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx, scale):
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*gradients, *(None,) * 6)
