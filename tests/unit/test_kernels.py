"""flash-linear-attention's Triton kernels behind our operators: equal to the naive loops, values and gradients.

On a CUDA device they are compiled. Elsewhere they run in Triton's interpreter, which takes minutes for all of them. fla
tries dozens of configurations for speed; here the first one serves, for trying them takes minutes more:

    TRITON_INTERPRET=1 python -m pytest tests/unit/test_kernels.py       needs triton 3.9 and fla-core 0.6
"""

import builtins
import functools
import importlib
import os
import sys

import pytest
import torch
from helpers import structure_inputs, tiny_structure

from linearize.ops import dispatch

pytestmark = pytest.mark.kernels
CUDA = torch.cuda.is_available()
# tf32 products on a device; float32 in the interpreter
TOLERANCE = 2e-2 if CUDA else 2e-4
# exponentials of keys thirty times as long, and of their rounding (gsa: 2.7e-2 on an H200)
STRONG = 5e-2 if CUDA else TOLERANCE
# row of STRUCTURES -> the kernel that it must have run on
KERNELS = {
    "gla": "chunk_gla",
    "hgrn2": "chunk_gla",
    "rwkv6": "chunk_gla",
    "longhorn": "chunk_gla",
    "gsa": "chunk_gsa",
    "mamba2": "chunk_simple_gla",
    "mlstm": "chunk_simple_gla",
    "lightning": "chunk_simple_gla",
    "linear": "chunk_simple_gla",
    "mala": "chunk_simple_gla",
    "deltanet negative": "chunk_gated_delta_rule",
    "gated_deltanet": "chunk_gated_delta_rule",
    "gated_deltaproduct": "chunk_gated_delta_rule",
    "kda": "chunk_kda",
    "rwkv7": "chunk_dplr_delta_rule",
    "mom": "chunk_simple_gla",
}


@pytest.fixture
def kernels_run(monkeypatch):
    """Lets the kernels serve; yields the names of those that did."""
    if not CUDA:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set")
        pytest.importorskip("triton", reason="triton is not installed (pip install triton==3.9.*)")
        interpreted()
        monkeypatch.setattr(dispatch, "on_device", lambda x: True)
    pytest.importorskip("fla.ops", reason="fla-core is not installed (pip install fla-core einops)")
    if CUDA:
        first_configurations()
    monkeypatch.setattr(dispatch, "_tried", {})  # every test sees what a kernel answers
    names, load = [], dispatch.load_kernel

    def recorded(module, name):
        names.append(name)
        return load(module, name)

    monkeypatch.setattr(dispatch, "load_kernel", recorded)
    return names


@functools.cache
def first_configurations():
    """Has every kernel run with the first of its configurations, none of them timed."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_first(self, *args, **keywords):
        self.configs = self.configs[:1]
        return run(self, *args, **keywords)

    Autotuner.run = run_first


@functools.cache
def interpreted():
    """Give fla's kernels what the interpreter needs: one configuration each, and loop counters that are tensors."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def counters(*bounds):
        for i in builtins.range(*map(int, bounds)):
            yield tl.core.tensor(TensorHandle(numpy.array([i], dtype=numpy.int32), tl.int32), tl.int32)

    def late_gather(*args, **keywords):  # the interpreter replaces it in triton.language alone
        return tl.gather(*args, **keywords)

    first_configurations()
    for module in ("gla", "simple_gla", "gsa", "gated_delta_rule", "kda", "generalized_delta_rule"):
        importlib.import_module(f"fla.ops.{module}")
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            module.range = counters
            module.gather = late_gather


def gradients(outputs, tensors, weights):
    return torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights)), tensors, allow_unused=True)


@pytest.mark.parametrize("case", ["alone", "strong gates", "documents"])
@pytest.mark.parametrize("row", KERNELS)
def test_kernel_equals_naive(row, case, kernels_run, recwarn):
    """With documents come masked tokens and a state; always grouped queries and a column more in the values."""
    documents, key_scale = case == "documents", 30.0 if case == "strong gates" else 1.0
    built = tiny_structure(row, J=1, G=2, K=16, dtype=torch.float32)
    sequence, keywords = structure_inputs(
        built, 70, B=1 + documents, key_scale=key_scale, state=documents, dtype=torch.float32
    )
    if documents:
        keywords["segments"] = (torch.arange(70) >= torch.tensor([[37], [50]])).long()
        keywords["write_mask"] = torch.rand(2, 70) < 0.8
    if CUDA:
        built, sequence = built.cuda(), [x.cuda() for x in sequence]
        keywords = {name: x.cuda() for name, x in keywords.items()}
    states = [keywords["initial_state"]] if documents else []
    tensors = [x.requires_grad_() for x in (*sequence, *states, *built.parameters())]
    got = built(*sequence, **keywords)
    refused = [str(w.message) for w in recwarn if "PyTorch serves" in str(w.message)]
    if CUDA and refused and "please upgrade triton" in refused[0].lower():
        pytest.skip(f"fla itself refuses this device: {refused[0]}")
    assert set(kernels_run) == {KERNELS[row]} and not refused
    wanted = built.naive(*sequence, **keywords)
    weights = [torch.randn_like(x) for x in wanted]
    pairs = [*zip(got, wanted), *zip(*(gradients(outputs, tensors, weights) for outputs in (got, wanted)))]
    pairs = [(a, b) for a, b in pairs if a is not None or b is not None]
    differences = [float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach()) for a, b in pairs]
    print(f"{row}: {max(differences):.1e}")
    assert max(differences) < (STRONG if case == "strong gates" else TOLERANCE)
