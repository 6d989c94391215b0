"""Parameters of some heads, picked from those of all: these heads then compute the same, with every mixer."""

import pytest
import torch
from helpers import tiny_base, tiny_student

from linearize.checkpoint.names import ADDED
from linearize.mixers.registry import CHOICES
from linearize.modeling.added import of_fewer_heads
from linearize.plan import LayerPlan, Plan

SOFTMAX = ((1,), (), (0, 2))


def outputs(student, ids) -> dict[int, torch.Tensor]:
    """Return the output of every layer's linear heads on the base's own hidden states."""
    found = {}

    def observe(observation) -> None:
        found[observation.layer] = observation.run()

    with torch.no_grad(), student.observed(observe):
        student(ids, use_cache=False)
    return found


@pytest.mark.parametrize("gate", ["key", "learned"])
@pytest.mark.parametrize("mixer", [name for name in CHOICES if name != "none"])
def test_picked_heads_compute_what_they_did_among_all(mixer, gate):
    if gate == "learned" and not CHOICES[mixer].has_gates({}):
        pytest.skip(f"{mixer} has no gate to learn")
    if mixer == "mom":
        pytest.skip("one router reads all heads, so that every plan is fitted by itself")
    mix = CHOICES[mixer].mixes[0]
    kind = {"mixer": mixer, "mix": mix, "gate": gate, "window": 8, "sinks": 2}
    everything = Plan("llama", tuple(LayerPlan((), **kind) for _ in SOFTMAX))
    smaller = Plan("llama", tuple(LayerPlan(heads, **kind) for heads in SOFTMAX))
    base = tiny_base()
    student = tiny_student(everything, base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ADDED in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    added = {name: value for name, value in student.state_dict().items() if ADDED in name}
    config = {**base.config.to_dict(), "head_dim": base.config.head_dim}
    fewer = tiny_student(smaller, base)
    unexpected = fewer.load_state_dict(of_fewer_heads(added, config, everything, smaller), strict=False).unexpected_keys
    assert not unexpected
    ids = torch.randint(2, 300, (1, 40), generator=generator)
    of_all, of_fewer = outputs(student, ids), outputs(fewer, ids)
    group = base.config.num_attention_heads // 3
    for layer, softmax_heads in enumerate(SOFTMAX):
        picked = [head for head in range(3) if head not in softmax_heads]
        expected = of_all[layer].unflatten(2, (3, group))[:, :, picked].flatten(2, 3)
        torch.testing.assert_close(of_fewer[layer], expected, rtol=1e-4, atol=2e-5)
