"""Every fast operator against its naive twin: values and gradients, odd lengths, states, documents, extreme gates."""

import itertools

import pytest
import torch
from helpers import LENGTHS, assert_same_with_gradients, window_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from linearize.ops import dispatch
from linearize.ops.chunks import carried, carried_at_once
from linearize.ops.delta_rule import delta_rule_chunked, delta_rule_naive
from linearize.ops.gla import gla, gla_chunked, gla_naive
from linearize.ops.simple_gla import simple_gla_chunked
from linearize.ops.softmax import softmax_attention, softmax_attention_naive
from linearize.ops.window import window_attention, window_attention_naive


def gla_inputs(T, B=2, J=2, G=3, K=8, V=5, dtype=torch.float64, key_scale=1.0, state=True, documents=False, seed=0):
    torch.manual_seed(seed)
    q, k = torch.randn(B, T, J * G, K, dtype=dtype), torch.randn(B, T, J, K, dtype=dtype)
    v, log_decay = torch.randn(B, T, J, V, dtype=dtype), F.logsigmoid(key_scale * torch.randn(B, T, J, K, dtype=dtype))
    initial = torch.randn(B, J, K, V, dtype=torch.promote_types(dtype, torch.float32)) if state else None
    segments = (torch.rand(B, T) < 0.05).cumsum(-1) if documents else None
    return [q, k, v, log_decay], initial, segments


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("state", "documents"), [(False, False), (True, False), (True, True)])
def test_gla_chunked_equals_naive(T, state, documents):
    inputs, initial, segments = gla_inputs(T, state=state, documents=documents)
    keywords = {"scale": 0.7, "initial_state": initial, "segments": segments}
    assert_same_with_gradients(
        lambda: gla_chunked(*inputs, **keywords), lambda: gla_naive(*inputs, **keywords), [*inputs, initial]
    )


@pytest.mark.parametrize("key_scale", [0.0, 30.0, 300.0])
def test_gla_extreme_gates(key_scale):
    inputs, initial, _ = gla_inputs(130, key_scale=key_scale)
    keywords = {"initial_state": initial}
    assert_same_with_gradients(
        lambda: gla_chunked(*inputs, **keywords), lambda: gla_naive(*inputs, **keywords), [*inputs, initial], 1e-8
    )


def test_gla_has_no_nan_at_key_scale_50():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4096, 2, 16), 50 * torch.randn(1, 4096, 2, 16)
    v, log_decay = torch.randn(1, 4096, 2, 16), F.logsigmoid(k)
    for x in (q, k, v, log_decay):
        x.requires_grad_()
    output, state = gla_chunked(q, k, v, log_decay)
    (output.sum() + state.sum()).backward()
    assert output.isfinite().all() and state.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    reference, _ = gla_naive(*(x.detach().double() for x in (q, k, v, log_decay)))
    torch.testing.assert_close(output.double(), reference, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("across", [55.0, 65.0])
def test_gla_where_decays_are_just_mild_and_just_not(across):
    """Scaled by up to exp(30) or not at all: float32 stays close to float64 on both sides, gradients too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 128, 2, 16, dtype=torch.float64) for _ in range(3))
    log_decay = -across / 63 * torch.ones_like(k)
    log_decay[..., ::2] *= 0.01  # beside channels that hardly decay
    results = []
    for operator, dtype in ((gla_naive, torch.float64), (gla_chunked, torch.float32)):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v, log_decay)]
        output, state = operator(*tensors)
        results.append([output, state, *torch.autograd.grad(output.sum() + state.sum(), tensors)])
    for wanted, got in zip(*results):
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_gla_float32_and_bf16_inputs():
    inputs, initial, _ = gla_inputs(200, dtype=torch.float32)
    wanted, _ = gla_naive(*(x.double() for x in inputs), initial_state=initial.double())
    got, got_state = gla_chunked(*inputs, initial_state=initial)
    assert got.dtype == got_state.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    halves = [x.bfloat16() for x in inputs]
    wanted, _ = gla_naive(*halves, initial_state=initial)
    got, got_state = gla_chunked(*halves, initial_state=initial)
    assert got.dtype == torch.bfloat16 and got_state.dtype == torch.float32
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-2, atol=1e-2)


def test_gla_state_stays_float32_under_autocast():
    inputs, initial, _ = gla_inputs(70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = gla(*inputs, initial_state=initial)
    wanted, wanted_state = gla(*inputs, initial_state=initial)
    assert state.dtype == torch.float32
    assert torch.equal(got, wanted) and torch.equal(state, wanted_state)


def test_gla_prefix_then_rest_equals_whole():
    inputs, initial, _ = gla_inputs(150)
    whole, final = gla(*inputs, initial_state=initial)
    state, pieces, start = initial, [], 0
    for length in (1, 64, 1, 1, 83):
        output, state = gla(*(x[:, start : start + length] for x in inputs), initial_state=state)
        pieces.append(output)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


def test_gla_documents_do_not_see_each_other():
    inputs, _, _ = gla_inputs(120, B=1, state=False)
    cut = 47
    segments = (torch.arange(120) >= cut).long()[None]
    packed, _ = gla(*inputs, segments=segments)
    first, _ = gla(*(x[:, :cut] for x in inputs))
    second, _ = gla(*(x[:, cut:] for x in inputs))
    torch.testing.assert_close(packed, torch.cat([first, second], 1))


def test_gla_of_no_tokens():
    inputs, initial, _ = gla_inputs(0)
    output, state = gla(*inputs, initial_state=initial)
    assert output.shape == (2, 0, 6, 5) and torch.equal(state, initial)


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 90), B=st.integers(1, 3), J=st.integers(1, 3), G=st.integers(1, 3), K=st.integers(1, 9),
    V=st.integers(1, 9), documents=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_gla_any_shape(T, B, J, G, K, V, documents, seed):
    inputs, initial, segments = gla_inputs(T, B, J, G, K, V, documents=documents, seed=seed)
    keywords = {"initial_state": initial, "segments": segments}
    assert_same_with_gradients(
        lambda: gla_chunked(*inputs, **keywords), lambda: gla_naive(*inputs, **keywords), [*inputs, initial]
    )


@pytest.mark.parametrize("T", LENGTHS[:-1])
@pytest.mark.parametrize("gated", [False, True])
def test_simple_gla_chunked_equals_naive(T, gated):
    (q, k, v, log_decay), initial, segments = gla_inputs(T, documents=True)
    log_decay = log_decay[..., 0] if gated else torch.zeros_like(log_decay[..., 0])
    keywords = {"scale": 0.7, "initial_state": initial, "segments": segments}
    assert_same_with_gradients(
        lambda: simple_gla_chunked(q, k, v, log_decay if gated else None, **keywords),
        lambda: gla_naive(q, k, v, log_decay.unsqueeze(-1).expand_as(k), **keywords),
        [q, k, v, log_decay if gated else None, initial],
    )


@pytest.mark.parametrize("T", LENGTHS[:-1])
@pytest.mark.parametrize(("decay", "erases"), [(None, False), ("head", False), ("channel", False), ("channel", True)])
def test_delta_rule_chunked_equals_naive(T, decay, erases):
    (q, k, v, log_decay), initial, segments = gla_inputs(T, documents=True)
    k = F.normalize(k, dim=-1)
    beta, erase = torch.rand_like(k), F.normalize(k + 0.3 * torch.randn_like(k), dim=-1)
    gates = [beta if erases else beta[..., :1].contiguous()]
    gates += {None: [], "head": [log_decay[..., :1].contiguous()], "channel": [log_decay]}[decay]
    inputs = [x.detach() for x in (q, k, v, *gates)]
    keywords = {"erase": erase if erases else None, "scale": 0.7, "initial_state": initial, "segments": segments}
    assert_same_with_gradients(
        lambda: delta_rule_chunked(*inputs, **keywords),
        lambda: delta_rule_naive(*inputs, **keywords),
        [*inputs, keywords["erase"], initial],
        1e-8,
    )


def kernel_like_fla(q, k, v, g, *, scale, initial_state=None, output_final_state=False, cu_seqlens=None):
    """The contract of fla's operators: as many heads everywhere, documents in one row, a float32 state for each."""
    assert q.shape == k.shape == g.shape and v.shape[:3] == q.shape[:3] and output_final_state
    rows = zip(*(x.unbind(0) for x in (q, k, v, g)))
    if cu_seqlens is not None:
        assert q.shape[0] == 1
        pairs = list(itertools.pairwise(cu_seqlens.tolist()))
        rows = [[x[0, start:end] for x in (q, k, v, g)] for start, end in pairs]
    outputs, finals = [], []
    for i, row in enumerate(rows):
        state = None if initial_state is None else initial_state[i : i + 1]
        output, final = gla_naive(*(x[None] for x in row), scale=scale, initial_state=state)
        outputs.append(output)
        finals.append(final)
    return torch.cat(outputs, dim=0 if cu_seqlens is None else 1), torch.cat(finals)


@pytest.fixture
def serving(monkeypatch):
    """serving(kernel) lets it serve every call of `gla`."""

    def serve(kernel):
        monkeypatch.setattr(dispatch, "on_device", lambda x: True)
        monkeypatch.setattr(dispatch, "load_kernel", lambda module, name: kernel)
        monkeypatch.setattr(dispatch, "_tried", {})

    return serve


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_kernels_are_called_as_they_want_to_be(state, documents, serving):
    calls = []
    serving(lambda *inputs, **keywords: calls.append(1) or kernel_like_fla(*inputs, **keywords))
    inputs, initial, segments = gla_inputs(60, B=3, V=9, dtype=torch.float32, state=state, documents=documents)
    keywords = {"scale": 0.7, "initial_state": initial, "segments": segments}
    assert_same_with_gradients(
        lambda: gla(*inputs, **keywords), lambda: gla_naive(*inputs, **keywords), [*inputs, initial], 1e-4
    )
    assert len(calls) == 2  # the first on two tokens, to see whether it works


def test_a_kernel_that_refuses_its_backward_does_not_serve(serving):
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("incorrect results on Hopper")

    lengths = []

    def kernel(q, *others, **keywords):
        lengths.append(q.shape[1])
        output, state = kernel_like_fla(q, *others, **keywords)
        return Refusing.apply(output), state

    serving(kernel)
    inputs, _, _ = gla_inputs(60, dtype=torch.float32)
    with pytest.warns(UserWarning, match="chunk_gla .* incorrect results on Hopper"):
        got, _ = gla(*inputs)
    torch.testing.assert_close(got, gla_chunked(*inputs)[0])
    gla(*inputs)
    assert lengths == [2]
    with torch.no_grad():  # without a backward it does
        gla(*inputs)
    assert lengths == [2, 2, 60]


def test_a_kernel_is_announced_once_and_left_out_where_told(serving):
    serving(kernel_like_fla)
    inputs, _, _ = gla_inputs(60, dtype=torch.float32)
    with dispatch.without_kernels():
        gla(*inputs)
    assert not dispatch._tried
    with pytest.warns(UserWarning, match="chunk_gla .* minutes") as warned:
        for T in (60, 30):
            gla(*(x[:, :T] for x in inputs))
            with torch.no_grad():
                gla(*(x[:, :T] for x in inputs))
    assert len(dispatch._tried) == 2 and len(warned) == 1


def test_kernels_serve_neither_float64_nor_single_tokens(serving):
    serving(None)
    inputs, _, _ = gla_inputs(5)
    for sequence in (inputs, [x[:, :1].float() for x in inputs]):
        assert dispatch.run_kernel("m", "n", sequence[0], list, initial_state=None, segments=None) is None


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(
    ("padding", "documents", "sinks"), [(False, False, False), (True, False, True), (True, True, True)]
)
@pytest.mark.parametrize(("window", "past"), [(1, 0), (16, 9), (16, 31), (200, 200)])
def test_window_equals_naive(T, padding, documents, sinks, window, past):
    inputs, keywords = window_inputs(T, T + past, padding=padding, documents=documents, sinks=sinks)
    keywords |= {"window": window, "scale": 0.3}
    assert_same_with_gradients(
        lambda: window_attention(*inputs, **keywords)[:1],
        lambda: window_attention_naive(*inputs, **keywords)[:1],
        inputs,
    )


@pytest.mark.parametrize("T", [1, 50])
@pytest.mark.parametrize(("window", "past"), [(1, 0), (16, 9), (16, 31), (200, 200)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scores", [{}, {"with_log_sum": True}, {"softcap": 1.5}, {"learned_sinks": torch.arange(4.0)}])
def test_every_sink_is_seen_without_a_mask(T, window, past, sinks, scores):
    inputs, keywords = window_inputs(T, T + past, sinks=sinks)
    keywords.pop("sink_mask", None)
    keywords |= {"window": window, "scale": 0.3, **scores}
    assert_same_with_gradients(
        lambda: [x for x in window_attention(*inputs, **keywords) if x is not None],
        lambda: [x for x in window_attention_naive(*inputs, **keywords) if x is not None],
        inputs,
    )


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 200), past=st.integers(0, 60), window=st.integers(1, 150),
    J=st.integers(1, 2), G=st.integers(1, 3),
    padding=st.booleans(), documents=st.booleans(), sinks=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_window_any_shape(T, past, window, J, G, padding, documents, sinks, seed):
    inputs, keywords = window_inputs(T, T + past, J, G, 2, padding, documents, sinks, seed)
    keywords |= {"window": window, "scale": 0.5, "with_log_sum": True}
    assert_same_with_gradients(
        lambda: window_attention(*inputs, **keywords), lambda: window_attention_naive(*inputs, **keywords), inputs
    )


@pytest.mark.parametrize("kind", ["nothing forgotten", "factors of heads", "documents"])
def test_states_carried_at_once_are_those_of_the_loop(kind):
    torch.manual_seed(0)
    state, increments = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 9, 4, 5, dtype=torch.float64)
    carry = {
        "nothing forgotten": None,
        "factors of heads": torch.rand(1, 3, 9, 1, 1, dtype=torch.float64),
        "documents": (torch.rand(2, 1, 9, 1, 1) < 0.6).double(),
    }[kind]
    for got, wanted in zip(carried_at_once(state, increments, carry), carried(state, increments, carry)):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_softmax_with_its_normaliser_equals_naive(softcap):
    """Values and gradients, those that come through the normaliser too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, rows, 8, dtype=torch.float64, requires_grad=True) for rows in (12, 20, 20))
    mask = torch.rand(2, 1, 12, 20) < 0.5
    mask[..., 3] = True
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    assert_same_with_gradients(
        lambda: softmax_attention(q, k, v, bias, scale=0.4, softcap=softcap),
        lambda: softmax_attention_naive(q, k, v, bias, scale=0.4, softcap=softcap),
        [q, k, v],
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("documents", [False, True])
def test_causal_softmax_equals_naive(softcap, documents):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    triangle = torch.full((16, 16), float("-inf"), dtype=q.dtype).triu(1)
    bias = None
    if documents:
        number = (torch.arange(16) >= 7).long()
        bias = torch.zeros(2, 1, 16, 16, dtype=q.dtype).masked_fill(number[:, None] != number, float("-inf"))
    whole = triangle if bias is None else bias + triangle
    assert_same_with_gradients(
        lambda: softmax_attention(q, k, v, bias, scale=0.4, softcap=softcap, causal=True),
        lambda: softmax_attention_naive(q, k, v, whole, scale=0.4, softcap=softcap),
        [q, k, v],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_normaliser_has_its_gradient_where_the_output_has_none(dtype):
    q, k, v = (torch.randn(1, 1, rows, 8).to(dtype).requires_grad_() for rows in (3, 5, 5))
    bias = torch.zeros(1, 1, 3, 5, dtype=dtype)
    wanted, got = (
        torch.autograd.grad(function(q, k, v, bias, scale=0.4)[1].sum(), [q, k])
        for function in (softmax_attention_naive, softmax_attention)
    )
    for one, other in zip(wanted, got):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(other, one, rtol=0.0, atol=1e-2 * (1 if dtype == torch.bfloat16 else 1e-12))


@pytest.mark.parametrize(("T", "past", "padding"), [(500, 0, True), (300, 200, False)])
def test_long_windows_go_in_more_blocks(T, past, padding, monkeypatch):
    monkeypatch.setattr("linearize.ops.window.MAX_BLOCK", 64)
    inputs, keywords = window_inputs(T, T + past, padding=padding, documents=False, sinks=True)
    keywords |= {"window": 310, "scale": 0.3, "with_log_sum": True}
    assert_same_with_gradients(
        lambda: window_attention(*inputs, **keywords), lambda: window_attention_naive(*inputs, **keywords), inputs
    )


def test_window_as_long_as_the_text_is_causal_attention():
    (q, k, v), _ = window_inputs(70, 70, G=1, sinks=False)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3)
    torch.testing.assert_close(window_attention(q, k, v, window=70, scale=0.3)[0], wanted.transpose(1, 2))


def test_window_never_makes_a_square():
    """A [T, T] float32 array of 64K tokens would take 16 GiB; the whole call stays far below."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = torch.randn(1, 65536, 1, 8)
    with torch.no_grad():
        window_attention(x, x, x, window=64, scale=1.0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2 * 2**20


def test_products_of_legal_scores_need_not_fit_into_float16():
    q = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)  # 102,400 before scaling, 12,800 after
    k = torch.cat([q, -q], dim=2)
    v = torch.arange(6, dtype=torch.float16).view(1, 1, 6, 1).expand(-1, -1, -1, 64)
    output, log_sum = softmax_attention_naive(q, k, v, None, scale=0.125)
    torch.testing.assert_close(output, torch.ones_like(output))
    assert log_sum.isfinite().all() and output.dtype == torch.float16
