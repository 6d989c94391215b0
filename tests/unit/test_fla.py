"""Structures and operators against flash-linear-attention's own naive loops, an outside authority.

Only its reference files are loaded, which are plain PyTorch; the package itself wants Triton to be imported.
"""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import structure_inputs, tiny_structure
from torch.nn import functional as F

J, K = 3, 8
CASES = {}


@functools.cache
def reference(file: str, name: str):
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("fla-core is not installed (pip install fla-core einops)")
    path = Path(found.submodule_search_locations[0]) / "ops" / file
    spec = importlib.util.spec_from_file_location(f"fla_reference_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def case(function):
    """Registers what fla computes for a structure: (structure, q, k, v, initial state) -> output, final state."""
    CASES[function.__name__] = function
    return function


def head_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


@case
def gla(built, q, k, v, state):
    run = reference("gla/naive.py", "naive_recurrent_gla")
    return run(q.softmax(-1) * K**0.5, k.softmax(-1), v, F.logsigmoid(k) / 16, state, True)


@case
def hgrn2(built, q, k, v, state):
    run = reference("gla/naive.py", "naive_recurrent_gla")
    return run(q.softmax(-1) * K**0.5, 1 - k.sigmoid(), v, F.logsigmoid(k), state, True)


@case
def gsa(built, q, k, v, state):
    run = reference("gsa/naive.py", "naive_recurrent_gsa")
    decay = F.logsigmoid(k) / 16
    keys, values = state.split([K, v.shape[-1]], dim=-1)
    output, (keys, values) = run(q, k, v, 1 - decay.exp(), decay, 1.0, (keys.transpose(-1, -2), values), True)
    return output, torch.cat([keys.transpose(-1, -2), values], dim=-1)


@case
def rwkv6(built, q, k, v, state):
    run = reference("rwkv6/recurrent_naive.py", "naive_recurrent_rwkv6")
    output, final = run(*head_first(q, k, v, -k.exp()), built.bonus.float(), 1.0, state, True)
    return output.transpose(1, 2), final


@case
def mamba2(built, q, k, v, state):
    run = reference("simple_gla/naive.py", "naive_recurrent_simple_gla")
    return run(q, k, v, -F.softplus(k.mean(-1)), 1.0, state, True)


@case
def retention(built, q, k, v, state):
    run = reference("simple_gla/naive.py", "naive_recurrent_simple_gla")
    return run(q, k, v, F.logsigmoid(k.mean(-1)) / 16, 1.0, state, True)


@case
def linear(built, q, k, v, state):
    run = reference("linear_attn/naive.py", "naive_recurrent_linear_attn")
    return run(F.elu(q) + 1, F.elu(k) + 1, v, 1.0, state, True)


@case
def deltanet(built, q, k, v, state):
    run = reference("delta_rule/naive.py", "delta_rule_recurrence")
    unit_q, unit_k = F.normalize(q, dim=-1) * K**0.5, F.normalize(k, dim=-1)
    output, final = run(*head_first(unit_q, unit_k, v, k.mean(-1).sigmoid()), state)
    return output.transpose(1, 2), final


@case
def gated_deltanet(built, q, k, v, state):
    run = reference("gated_delta_rule/naive.py", "naive_recurrent_gated_delta_rule")
    pooled = k.mean(-1)
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return run(unit_q, unit_k, v, pooled.sigmoid(), -F.softplus(pooled), 1.0, state, True)


@case
def gated_deltaproduct(built, q, k, v, state):
    run = reference("gated_delta_product/naive.py", "naive_recurrent_gated_delta_product")
    pooled = k.mean(-1)
    keys, values, betas = built._parts(k, v, pooled.unsqueeze(-1))
    spread = [x.flatten(1, 2) for x in (keys, values, betas.squeeze(-1))]
    keys, values, betas = spread
    return run(
        F.normalize(q, dim=-1), keys, values, -F.softplus(pooled), betas, 1.0,
        initial_state=state, output_final_state=True, num_householder=built.steps,
    )  # fmt: skip


@case
def kda(built, q, k, v, state):
    run = reference("kda/naive.py", "naive_recurrent_kda")
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return run(unit_q, unit_k, v, F.logsigmoid(k) / 16, k.mean(-1).sigmoid(), 1.0, state, True)


@case
def rwkv7(built, q, k, v, state):
    run = reference("generalized_delta_rule/dplr/naive.py", "dplr_recurrence")
    decay, strength = -torch.tensor(-0.5).exp() * k.sigmoid(), k.sigmoid()
    unit = F.normalize(k, dim=-1)
    sequence = head_first(q * K**0.5, strength * k, v, -unit, strength * unit, decay)
    output, final = run(*sequence, state)
    return output.transpose(1, 2), final


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("name", CASES)
def test_structure_equals_flash_linear_attention(name, T):
    built = tiny_structure(name, J=J, G=1, K=K, dtype=torch.float32)
    (q, k, v), keywords = structure_inputs(built, T, state=True, extra=0, dtype=torch.float32)
    state = keywords["initial_state"]
    wanted, wanted_state = CASES[name](built, q, k, v, state.clone())
    got, got_state = built(q, k, v, initial_state=state)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_state, wanted_state, rtol=1e-4, atol=1e-4)


def test_retnet_equals_flash_linear_attention():
    """fla fixes the decays of eight heads; ours spread the same ones over any number."""
    built = tiny_structure("retnet", J=8, G=1, K=K, dtype=torch.float32)
    (q, k, v), _ = structure_inputs(built, 70, extra=0, dtype=torch.float32)
    wanted = reference("retention/naive.py", "naive_retention")(*head_first(q * K**0.5, k, v)).transpose(1, 2)
    torch.testing.assert_close(built(q, k, v)[0], wanted, rtol=1e-4, atol=1e-4)
