"""Losses over a large vocabulary, some tokens at a time.

Both take hidden states, never logits. Logits exist for `chunk_tokens` tokens at once, and their gradient with respect
to the hidden states is formed in the same pass, so no [tokens, vocabulary] float32 array is ever made.

Shapes: N tokens, D hidden size, C vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.modeling.readout import Readout

# bytes of float32 logits that a measurement has in memory at once
LOGIT_BYTES = 2**25


def chunk_for(head: Readout) -> int:
    """Return the number of tokens whose logits take LOGIT_BYTES."""
    return max(16, LOGIT_BYTES // (4 * head.weight.shape[0]))


def chunked_kl(
    student: Tensor,
    teacher: Tensor,
    student_head: Readout,
    teacher_head: Readout,
    weights: Tensor,
    chunk_tokens: int,
) -> Tensor:
    """Sum weights * KL(teacher || student) over tokens, in nats (forward KL; methods: arXiv 2410.10254, 2502.14458).

    Args:
        student, teacher: hidden states after the final norm, [N, D]; the teacher's D may differ.
        student_head, teacher_head: output embeddings of the two.
        weights: [N], zero for positions that do not count.
        chunk_tokens: tokens whose logits exist at once.
    """
    head = student_head
    return _ChunkedLoss.apply(student, head.weight, head.bias, head, teacher, teacher_head, None, weights, chunk_tokens)


def chunked_cross_entropy(hidden: Tensor, head: Readout, targets: Tensor, weights: Tensor, chunk_tokens: int) -> Tensor:
    """Sum weights * cross-entropy to `targets` [N] over tokens, in nats. Other arguments are those of `chunked_kl`."""
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, None, None, targets, weights, chunk_tokens)


class _ChunkedLoss(torch.autograd.Function):
    """The sum over tokens t of weights_t l(logits_t), with its gradients formed in the forward pass.

    l is the divergence from a teacher, d l / d logits = p - p_teacher, or the cross-entropy to a target, p - onehot,
    where p = softmax(logits).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Readout,
        teacher: Tensor | None,
        teacher_head: Readout | None,
        targets: Tensor | None,
        weights: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        """Return the loss. `weight` and `bias` are those of `head`, named here so that they get gradients."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            token_weight = weights[chunk].float()
            logits = head(hidden[chunk])
            if targets is not None:
                losses, d_logits = _cross_entropy(logits, targets[chunk])
            else:
                assert teacher is not None and teacher_head is not None
                losses, d_logits = _divergence(logits, F.log_softmax(teacher_head(teacher[chunk]), dim=-1))
            total += (token_weight * losses).sum()
            if head.softcap is not None:
                d_logits.mul_(1 - (logits / head.softcap).square())
            # a factor per token: it is cheaper on the small operand of each product
            token_weight = (token_weight * head.scale)[:, None]
            if d_hidden is not None:
                d_hidden[chunk] = token_weight * (d_logits.to(hidden.dtype) @ weight.to(hidden.dtype))
            if d_weight is not None:
                d_weight += d_logits.T @ (token_weight * hidden[chunk].float())
            if d_bias is not None:
                d_bias += (token_weight * d_logits).sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass; the other six inputs have none."""
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*gradients, *(None,) * 6)


def _divergence(logits: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) [N] and its gradient with respect to the student's logits [N, C].

    `teacher_log_probs` [N, C] is overwritten, to save its memory.
    """
    log_probs = F.log_softmax(logits, dim=-1)
    teacher_probs = teacher_log_probs.exp()
    losses = teacher_log_probs.sub_(log_probs).mul_(teacher_probs).sum(-1)
    return losses, log_probs.exp_().sub_(teacher_probs)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy to `targets` [N] and its gradient [N, C]; a negative target stands for any."""
    log_probs = F.log_softmax(logits, dim=-1)
    targets = targets[:, None].clamp(min=0)
    losses = -log_probs.gather(-1, targets)[:, 0]
    d_logits = log_probs.exp_().scatter_add_(-1, targets, -torch.ones_like(targets, dtype=log_probs.dtype))
    return losses, d_logits
