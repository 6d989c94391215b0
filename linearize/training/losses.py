"""Losses over a large vocabulary, some tokens at a time.

Both take hidden states, never logits: logits exist for `chunk_tokens` tokens at once, and their gradient with respect to
the hidden states is formed in the same pass, so no [tokens, vocabulary] float32 array is ever made.

Shapes: N tokens, D hidden size, C vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked_kl(
    student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor, weights: Tensor, chunk_tokens: int
) -> Tensor:
    """Sum over tokens of weights * KL(teacher || student), in nats (forward KL; methods: arXiv 2410.10254, 2502.14458).

    Args:
        student, teacher: hidden states after the final norm, [N, D] (the teacher's D may differ).
        student_head, teacher_head: output embeddings [C, D].
        weights: [N], zero for positions that do not count.
    """
    return _ChunkedLoss.apply(student, student_head, teacher, teacher_head, None, weights, chunk_tokens)


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk_tokens: int) -> Tensor:
    """Sum over tokens of weights * cross-entropy to `targets` [N], in nats. Other arguments as `chunked_kl`."""
    return _ChunkedLoss.apply(hidden, head, None, None, targets, weights, chunk_tokens)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, teacher, teacher_head, targets, weights, chunk_tokens):
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            weight = weights[rows].float()[:, None]
            log_probs = F.log_softmax((hidden[rows] @ head.T.to(hidden.dtype)).float(), dim=-1)
            if targets is None:
                reference = F.log_softmax((teacher[rows] @ teacher_head.T.to(teacher.dtype)).float(), dim=-1)
                probs = reference.exp()
                total += (weight * probs * (reference - log_probs)).sum()
                d_logits = log_probs.exp_().sub_(probs)
            else:
                picked = targets[rows, None].clamp(min=0)
                total -= (weight * log_probs.gather(-1, picked)).sum()
                d_logits = log_probs.exp_().scatter_add_(-1, picked, -torch.ones_like(weight))
            d_logits = d_logits.mul_(weight)
            if needs_hidden:
                d_hidden[rows] = d_logits.to(hidden.dtype) @ head.to(hidden.dtype)
            if needs_head:
                d_head += d_logits.T @ hidden[rows].float()
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        d_hidden, d_head = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype)
        d_head = None if d_head is None else (d_head * scale).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None, None
