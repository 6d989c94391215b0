"""Attention transfer and window dropout on a tiny student."""

import torch
from helpers import student_of, tiny_base

from linearize.data.packing import Batch
from linearize.modeling.linear_heads import LinearHeads
from linearize.training.transfer import transfer_backward
from linearize.training.window_dropout import window_dropout


def test_transfer_is_the_sum_of_the_layers_own_losses():
    """Against one graph over all layers, with the base's attention computed beside it."""
    base, ids = tiny_base(), torch.randint(2, 300, (2, 50))
    students = [student_of(base, mixer="hedgehog", mix="joint") for _ in range(2)]
    batch = Batch(ids, torch.arange(50).expand(2, -1), ids)
    loss = transfer_backward(students[0], batch, 0.5)
    errors = []

    def match(seen):
        target = seen.target.detach()
        missed, wanted = (x.square().flatten(1).sum(1) for x in (seen.run() - target, target))
        errors.append((missed / wanted).mean())
        return target

    with students[1].observed(match):
        students[1].base_model(ids, position_ids=batch.position_ids, use_cache=False)
    (0.5 * sum(errors) / 3).backward()
    torch.testing.assert_close(loss, 0.5 * sum(errors).detach() / 3)
    found = 0
    for (name, one), (_, other) in zip(students[0].named_parameters(), students[1].named_parameters()):
        if ".mixer." in name:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
            found += bool(one.grad.abs().max() > 0)
    assert found == 9  # log_mass and both feature maps of three layers


def test_transfer_does_not_depend_on_how_rows_are_spread():
    ids = torch.randint(2, 300, (4, 50))
    together, apart = (student_of(tiny_base(), mixer="hedgehog", mix="joint") for _ in range(2))
    batch = Batch(ids, torch.arange(50).expand(4, -1), ids)
    loss = transfer_backward(together, batch, 1.0)
    losses = [transfer_backward(apart, part, 0.25) for part in batch.split(1)]
    torch.testing.assert_close(sum(losses), loss)
    for (name, one), (_, other) in zip(together.named_parameters(), apart.named_parameters()):
        if ".mixer." in name:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_window_dropout_shortens_and_restores():
    student = student_of(tiny_base())
    heads = [module for module in student.modules() if isinstance(module, LinearHeads)]
    ids = torch.randint(2, 300, (1, 40))
    with torch.no_grad():
        before = student(ids).logits
        with window_dropout(student, 0.999999):
            assert [module.window for module in heads] == [2, 2, 2]
            assert not torch.allclose(student(ids).logits, before)
        assert [module.window for module in heads] == [8, 8, 8] and torch.equal(student(ids).logits, before)
    summed = student_of(tiny_base(), mix="sum")
    with window_dropout(summed, 0.999999):
        assert not any(m.window_enabled for m in summed.modules() if isinstance(m, LinearHeads))
    assert all(m.window_enabled and m.window == 8 for m in summed.modules() if isinstance(m, LinearHeads))
