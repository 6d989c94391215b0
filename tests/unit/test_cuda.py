"""On a CUDA device: window attention by PyTorch's fused kernel, and whole students, equal to what a CPU computes."""

import pytest
import torch
from helpers import plan_for, tiny_base, tiny_student, tokens, window_inputs

from linearize.mixers.registry import MIXERS
from linearize.modeling.cache import CACHE_NAME
from linearize.ops.window import window_attention, window_attention_naive
from linearize.plan import NO_BRANCH, LayerPlan, Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# products of a device may be rounded to tf32
CLOSE = {torch.float32: 5e-3, torch.bfloat16: 6e-2}


def moved(x, dtype):
    return x if x is None else x.to("cuda", dtype if x.is_floating_point() else x.dtype)


def worst(got, wanted) -> float:
    """The largest difference, relative to the largest value."""
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(got, wanted) if b is not None]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("T", [1, 70, 500])
@pytest.mark.parametrize(
    ("padding", "documents", "sinks"), [(False, False, False), (False, True, True), (True, True, True)]
)
@pytest.mark.parametrize(("window", "past"), [(1, 0), (20, 9), (20, 31), (200, 200)])
def test_window_equals_naive(dtype, T, padding, documents, sinks, window, past):
    inputs, keywords = window_inputs(T, T + past, padding=padding, documents=documents, sinks=sinks)
    options = {"window": window, "scale": 0.3, "with_log_sum": True}
    exact = [moved(x, dtype).cpu().double().requires_grad_() for x in inputs]
    wanted = window_attention_naive(*exact, **keywords, **options)
    weights = [torch.randn_like(x) for x in wanted]
    wanted = [*wanted, *torch.autograd.grad(sum((x * w).sum() for x, w in zip(wanted, weights)), exact)]
    device = [moved(x, dtype).requires_grad_() for x in inputs]
    got = window_attention(*device, **{name: moved(x, dtype) for name, x in keywords.items()}, **options)
    loss = sum((x * w.cuda()).sum() for x, w in zip(got, weights))
    assert worst([*got, *torch.autograd.grad(loss, device)], wanted) < CLOSE[dtype]


def student_of(mixer: str):
    """A tiny student whose recurrent branch matters, and its base."""
    plan = plan_for("outside", 3)
    if mixer != "gla":
        layer = LayerPlan((1,), mixer, window=8, sinks=2, mix=NO_BRANCH if mixer == NO_BRANCH else "outside")
        plan = Plan("llama", (layer,) * 3)
    base = tiny_base("gqa")
    return tiny_student(plan, base)


@torch.no_grad()
@pytest.mark.parametrize("mixer", [NO_BRANCH, *MIXERS])
def test_student_is_the_same_on_a_device(mixer):
    student, ids = student_of(mixer), tokens(length=90)
    wanted = student(ids, use_cache=False).logits
    student, ids = student.cuda(), ids.cuda()
    full = student(ids, use_cache=False).logits
    cache, outputs = None, []
    for part in ids.split([60, 27, 1, 1, 1], dim=1):
        step = student(part, use_cache=True, **{CACHE_NAME: cache})
        cache = step[CACHE_NAME]
        outputs.append(step.logits)
    assert worst([full], [wanted]) < CLOSE[torch.float32]
    assert worst([torch.cat(outputs, 1)], [full]) < CLOSE[torch.float32]


@pytest.mark.parametrize("mixer", [NO_BRANCH, *MIXERS])
def test_student_has_the_same_gradients_on_a_device(mixer):
    found = []
    for device in ("cpu", "cuda"):
        student, ids = student_of(mixer).to(device), tokens(length=90).to(device)
        student(ids, labels=ids, use_cache=False).loss.backward()
        found.append([x.grad.cpu() for _, x in sorted(student.named_parameters()) if x.grad is not None])
    assert len(found[0]) == len(found[1]) and worst(found[1], found[0]) < CLOSE[torch.float32]
