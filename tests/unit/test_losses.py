"""Losses in chunks, rows that copy a span, and the rows of a training run."""

import pytest
import torch

from linearize.data.packing import IGNORED
from linearize.modeling.readout import Readout
from linearize.training.losses import chunked_cross_entropy, chunked_kl


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, 2.0)])
def test_chunked_losses_equal_the_whole_and_reach_every_position(kind, chunk, scale, softcap):
    torch.manual_seed(0)
    hidden, teacher = torch.randn(29, 6, requires_grad=True), torch.randn(29, 5)
    head, teacher_head = torch.randn(11, 6, requires_grad=True), torch.randn(11, 5)
    bias = torch.randn(11, requires_grad=True)
    weights, targets = torch.rand(29) + 0.1, torch.randint(11, (29,))
    logits = scale * (hidden @ head.T + bias)
    log = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
    readout = Readout(head, bias, scale, softcap)
    if kind == "kl":
        reference = (teacher @ teacher_head.T).log_softmax(-1)
        wanted = (weights[:, None] * reference.exp() * (reference - log)).sum()
        got = chunked_kl(hidden, teacher, readout, Readout(teacher_head), weights, chunk)
    else:
        wanted = -(weights * log.gather(-1, targets[:, None])[:, 0]).sum()
        got = chunked_cross_entropy(hidden, readout, targets, weights, chunk)
    torch.testing.assert_close(got, wanted)
    wanted_gradients = torch.autograd.grad(3 * wanted, (hidden, head, bias))
    gradients = torch.autograd.grad(3 * got, (hidden, head, bias))
    for a, b in zip(gradients, wanted_gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (gradients[0].abs().sum(-1) > 0).all()


def test_an_uncounted_position_gets_no_gradient():
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    chunked_cross_entropy(hidden, Readout(head), torch.tensor([1, IGNORED, 2, IGNORED]), weights, 2).backward()
    assert (hidden.grad.abs().sum(-1) > 0).tolist() == [True, False, True, False]
