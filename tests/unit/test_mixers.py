"""Every gated structure: chunked = token by token, values and gradients; states, documents, padding, extreme gates.

A new structure is one row of STRUCTURES in helpers.py. test_fla.py compares the formulas with flash-linear-attention's.
"""

import math

import pytest
import torch
from helpers import (
    STRUCTURES,
    assert_same_with_gradients,
    structure_inputs,
    tiny_base,
    tiny_structure,
    tiny_student,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.errors import ConfigError
from linearize.mixers.mixer import RecurrentInputs, Site
from linearize.mixers.registry import MIXERS, build_mixer
from linearize.modeling.context import context_of
from linearize.modeling.export import portable_source
from linearize.modeling.linear_heads import LinearHeads
from linearize.ops.window import Scores
from linearize.plan import LayerPlan, Plan

GATED = [row for row, (name, options) in STRUCTURES.items() if MIXERS[name].has_gates(options)]


def test_every_structure_has_a_row():
    assert {name for name, _ in STRUCTURES.values()} == set(MIXERS)


@pytest.mark.parametrize("row", STRUCTURES)
def test_first_values_do_not_depend_on_what_the_model_is_loaded_in(row):
    """transformers makes the weights' dtype the default one while it builds a model."""
    name, options = STRUCTURES[row]
    mix = "outside" if "outside" in MIXERS[name].mixes else "joint"
    plan = LayerPlan((), mixer=name, mixer_options=options, window=8, sinks=2, mix=mix)
    built = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            built.append(LinearHeads(plan, Site((0, 1), 2, 2, 8, 1, 4), 32).state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
    for key, value in built[0].items():
        assert value.dtype == built[1][key].dtype == torch.float32 and torch.equal(value, built[1][key]), key


def test_what_a_cache_keeps_of_an_assignment_is_all_of_it():
    built = tiny_structure("vq")
    assignment = built.assign(torch.randn(3, 5, 2, 8, dtype=torch.float64))
    encoded = built.encode_assignment(assignment)
    assert encoded.dtype == torch.uint8 and encoded.shape[-1] == built.assignment_bytes() == 3
    torch.testing.assert_close(built.decode_assignment(encoded, torch.float64), assignment, rtol=0, atol=1e-15)
    with pytest.raises(ConfigError, match="codes: got 7, which is odd"):
        build_mixer("vq", Site((0,), 1, 1, 8, 0, 1), {"codes": 7})


def compare(built, sequence, keywords, tolerance=1e-8):
    tensors = [*sequence, *(x for x in keywords.values() if x.is_floating_point()), *built.parameters()]
    assert_same_with_gradients(
        lambda: built(*sequence, **keywords), lambda: built.naive(*sequence, **keywords), tensors, tolerance
    )


# around one chunk of 64, and several with a rest
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("row", STRUCTURES)
def test_chunked_equals_token_by_token(row, T):
    built = tiny_structure(row)
    compare(built, *structure_inputs(built, T, B=1 if T == 200 else 2, state=T != 64))


@pytest.mark.parametrize(("row", "key_scale"), [*((row, 1.0) for row in STRUCTURES), *((row, 30.0) for row in GATED)])
def test_documents_and_masked_tokens(row, key_scale):
    built = tiny_structure(row)
    sequence, keywords = structure_inputs(built, 90, state=True, key_scale=key_scale)
    keywords["segments"] = (torch.rand(2, 90) < 0.06).cumsum(-1)
    keywords["write_mask"] = torch.rand(2, 90) < 0.7
    compare(built, sequence, keywords, 1e-8 if key_scale == 1 else 1e-5)


@pytest.mark.parametrize("row", STRUCTURES)
def test_a_packed_document_equals_the_document_alone(row):
    built = tiny_structure(row)
    sequence, _ = structure_inputs(built, 100, B=1)
    packed, state = built(*sequence, segments=(torch.arange(100) >= 37).long()[None])
    first, _ = built(*(x[:, :37] for x in sequence))
    second, final = built(*(x[:, 37:] for x in sequence))
    torch.testing.assert_close(packed, torch.cat([first, second], dim=1))
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("row", STRUCTURES)
def test_prefill_then_decode_equals_whole(row):
    built = tiny_structure(row)
    sequence, keywords = structure_inputs(built, 80, state=True)
    whole, final = built(*sequence, **keywords)
    output, state = built(*(x[:, :70] for x in sequence), **keywords)
    outputs = [output]
    for t in range(70, 80):
        output, state = built.naive(*(x[:, t : t + 1] for x in sequence), initial_state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("row", STRUCTURES)
@pytest.mark.parametrize("key_scale", [0.0, 30.0])
def test_extreme_gates(row, key_scale):
    if row in ("linear exp", "based") and key_scale > 1:
        key_scale = 3.0  # these features grow without bound, and so does what they sum to
    built = tiny_structure(row)
    sequence, _ = structure_inputs(built, 70, key_scale=key_scale)
    output, _ = built(*sequence)
    assert output.isfinite().all()
    wanted, _ = built.naive(*sequence)
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    built, sequence = tiny_structure(row, dtype=torch.float32), [x.float() for x in sequence]
    (read, _), (decoded, _) = built(*sequence), built.naive(*sequence)
    assert (decoded - read).abs().max() <= 1e-4 * read.abs().max()


@pytest.mark.parametrize("outlier", [2000.0, 5000.0])
@pytest.mark.parametrize("row", [row for row in STRUCTURES if row not in ("linear exp", "based")])
def test_one_channel_far_above_the_rest(row, outlier):
    """As keys of pretrained models have: float32 stays finite, gradients too, and close to float64."""
    built = tiny_structure(row)
    (q, k, v), _ = structure_inputs(built, 70, B=1)
    k[..., 3] += outlier
    results = []
    for dtype in (torch.float64, torch.float32):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output, state = tiny_structure(row, dtype=dtype)(*tensors)
        gradients = torch.autograd.grad(output.sum() + state.sum(), tensors)
        results.append([output.double(), *(x.double() for x in gradients)])
    for wanted, got in zip(*results):
        assert got.isfinite().all()
        assert (got - wanted).abs().max() <= 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("row", GATED)
def test_gate_offsets(row):
    built = tiny_structure(row)
    sequence, keywords = structure_inputs(built, 40, gate_offset=True)
    compare(built, sequence, keywords)
    moved, _ = built(*sequence, **keywords)
    plain, _ = built(*sequence)
    zero, _ = built(*sequence, gate_offset=torch.zeros_like(keywords["gate_offset"]))
    assert torch.equal(plain, zero) and not torch.allclose(plain, moved)


@pytest.mark.parametrize("row", STRUCTURES)
def test_float32(row):
    built = tiny_structure(row)
    sequence, _ = structure_inputs(built, 130)
    wanted, _ = built.naive(*sequence)
    got, state = tiny_structure(row, dtype=torch.float32)(*(x.float() for x in sequence))
    assert got.dtype == state.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "row", [row for row, (name, options) in STRUCTURES.items() if MIXERS[name].shares_normaliser(options)]
)
def test_shared_normalisers_are_not_negative(row):
    built = tiny_structure(row)
    assert built.positive
    (q, k, v), _ = structure_inputs(built, 100)
    weights, _ = built(q, k, torch.ones_like(v))
    assert (weights[..., : v.shape[-1]] >= 0).all()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    built = tiny_structure(
        draw(st.sampled_from(list(STRUCTURES))),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        2 * draw(st.integers(3, 6)),
    )
    T, state = draw(st.integers(1, 100)), draw(st.booleans())
    sequence, keywords = structure_inputs(
        built, T, B=draw(st.integers(1, 3)), extra=draw(st.integers(0, 1)), state=state
    )
    if draw(st.booleans()):
        keywords["write_mask"] = torch.rand(sequence[0].shape[:2]) < 0.8
    got, got_state = built(*sequence, **keywords)
    wanted, wanted_state = built.naive(*sequence, **keywords)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(got_state, wanted_state, rtol=1e-7, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_bf16_inputs_are_computed_in_float32(name):
    """The branch of a bfloat16 model: the numbers of a float32 one, rounded at the end; its state stays float32."""
    heads = LinearHeads(LayerPlan((), mixer=name, window=9, mix="sum"), Site((0, 1), 2, 2, 8, 1, 4), 32)
    heads.window_enabled = False
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, count, 8).bfloat16() for count in (4, 2, 2))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
        context = context_of(k_, v_, RecurrentInputs(keys=k_), sinks=0, padding_mask=None, segments=None)
        results.append(heads(q_, q_, context, scores=Scores(0.3), state=None))
    (output, state), (wanted, wanted_state) = results
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(output, wanted.bfloat16()) and torch.equal(state, wanted_state)


LOUD = {"outside": {"log_mass": 0.0, "branch_scale": 0.5}}
IN_MODELS = [
    (name, mix, gate)
    for name, entry in MIXERS.items()
    for mix in ("sum", "outside", "joint")
    for gate in ("key", "learned")
    if (entry.has_gates({}) or gate == "key") and mix in entry.mixes and (mix != "joint" or entry.shares_normaliser({}))
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "mix", "gate"), IN_MODELS)
def test_in_a_model(name, mix, gate):
    """Cached = uncached, padded = unpadded, packed = separate, branch audible; whole layers and single heads."""
    base = tiny_base()
    layers = tuple(
        LayerPlan(heads, mixer=name, window=9, sinks=2, mix=mix, gate=gate, mix_options=LOUD.get(mix, {}))
        for heads in ((), (1,), (0, 2))
    )
    student = tiny_student(Plan("llama", layers), base)
    torch.manual_seed(0)
    for parameter_name, parameter in student.named_parameters():
        if "gate_projection" in parameter_name:
            parameter.normal_(std=0.1)
    ids = torch.randint(2, 300, (2, 60))
    whole = student(ids).logits
    assert whole.isfinite().all()

    first = student(ids[:, :31], use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for t in range(31, 60):
        logits.append(student(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-3, atol=2e-4)

    padded = torch.cat([torch.ones(2, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(65) >= 5).long().expand(2, -1)
    torch.testing.assert_close(student(padded, attention_mask=mask).logits[:, 5:], whole, rtol=1e-3, atol=2e-4)

    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    packed = student(ids[:1], position_ids=positions, use_cache=False).logits
    separate = torch.cat([student(ids[:1, :25]).logits, student(ids[:1, 25:]).logits], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-3, atol=2e-4)

    with student.recurrent_branch_off():
        assert (student(ids).logits - whole).abs().max() > 1e-3


def heads_alone(name, mix, *, offset=0.0, size=1.0, T=70, **settings):
    """Linear heads by themselves, and a function that runs them: output for random values, and for values of one.

    `offset` is added to every score, by a channel that clusters do not see; `size` multiplies queries and keys.
    """
    heads = LinearHeads(
        LayerPlan((), mixer=name, window=9, sinks=0, mix=mix, **settings), Site((0, 1), 2, 2, 8, 1, 4), 32
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (size * torch.randn(1, T, count, 8, generator=generator) for count in (4, 2, 2))
    if name == "vq":
        heads.structure.fit(q[0], q[0], k[0], 0.3)
    if heads.log_mass is not None:
        heads.log_mass.zero_()
    recurrent_inputs = heads.recurrent_inputs(k, torch.zeros(1, T, 32))
    q[..., 0], k[..., 0] = 1.0, offset / 0.3

    def run(values):
        context = context_of(k, values, recurrent_inputs, sinks=0, padding_mask=None, segments=None)
        return heads(q, q, context, scores=Scores(0.3), state=None)[0]

    return heads, lambda: (run(v), run(torch.ones_like(v)))


@torch.no_grad()
@pytest.mark.parametrize("mix", ["joint", "sum"])
@pytest.mark.parametrize("offset", [-1000.0, -90.0, -20.0, 60.0, 90.0, 1000.0])
def test_what_all_scores_share_changes_nothing(mix, offset):
    """As in softmax. A bias of keys adds the same to all scores of a query, as much as it is large."""
    (_, plain), (_, moved) = (heads_alone("vq", mix, offset=x) for x in (0.0, offset))
    torch.testing.assert_close(moved()[0], plain()[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 4.0, 8.0])
@pytest.mark.parametrize(
    ("name", "mix"),
    [
        (name, mix)
        for name, mix, gate in IN_MODELS
        if gate == "key" and mix != "sum" and MIXERS[name].shares_normaliser({})
    ],
)
def test_window_and_past_share_one_normaliser(name, mix, size):
    """Values of one come to one: with both, with the window off and with any mass of the past."""
    heads, run = heads_alone(name, mix, size=size)
    for mass in (-20.0, 0.0, 20.0, 200.0):
        heads.log_mass.fill_(mass)
        torch.testing.assert_close(run()[1], torch.ones(1, 70, 4, 8), rtol=1e-3, atol=1e-3)
    heads.window_enabled = False
    alone = run()[1]
    assert (alone[:, :9] == 0).all()
    torch.testing.assert_close(alone[:, 9:], torch.ones(1, 61, 4, 8), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("past", "window"), [(45.0, -45.0), (5.0, -84.0), (0.0, -100.0), (400.0, -400.0)])
def test_a_past_that_outweighs_the_window_by_far(past, window):
    heads = LinearHeads(LayerPlan((), mixer="vq", window=16, sinks=0, mix="joint"), Site((0,), 1, 1, 8, 0, 1), 8)
    heads.structure.log_scale.fill_(math.log(0.25))
    heads.log_mass.zero_()
    q, k, v = torch.zeros(1, 96, 1, 8), torch.zeros(1, 96, 1, 8), torch.ones(1, 96, 1, 8)
    q[..., 0] = 1.0
    k[:, :80, 0, 0], k[:, 80:, 0, 0] = past / 0.25, window / 0.25
    context = context_of(k, v, heads.recurrent_inputs(k, None), sinks=0, padding_mask=None, segments=None)
    output, _ = heads(q, q, context, scores=Scores(0.25), state=None)
    torch.testing.assert_close(output[0, -1], torch.ones(1, 8))


@pytest.mark.parametrize("mass", [-20.0, -16.0, -8.0, 0.0, 8.0, 16.0])
def test_a_small_share_learns_as_exactly_as_a_large_one(mass):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        plan = LayerPlan((), mixer="vq", window=9, sinks=0, mix="joint")
        heads = LinearHeads(plan, Site((0,), 1, 1, 8, 0, 1), 8).to(dtype)
        torch.nn.init.constant_(heads.log_mass, mass)
        windowed, past = torch.ones(1, 1, 1, 8, dtype=dtype), torch.full((1, 1, 1, 9), 1.5, dtype=dtype)
        past[..., -1] = 0
        heads.mix_outputs(windowed, torch.zeros(1, 1, 1, 1, dtype=dtype), past).sum().sum().backward()
        gradients.append(heads.log_mass.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


@torch.no_grad()
def test_exponential_features_do_not_overflow():
    for mix in ("sum", "outside", "joint"):
        _, run = heads_alone("linear", mix, size=100.0, mixer_options={"feature_map": "exp"})
        assert all(output.isfinite().all() for output in run()), mix


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, entry in MIXERS.items() if entry.has_gates({})])
def test_a_learned_gate_starts_as_the_key(name):
    base, logits = tiny_base(), []
    ids = torch.randint(2, 300, (1, 40))
    for gate in ("key", "learned"):
        layers = (LayerPlan((), mixer=name, window=9, mix="sum", gate=gate),) * 3
        student = tiny_student(Plan("llama", layers), base)
        logits.append(student(ids).logits)
    assert torch.equal(*logits)
    added = [p.numel() for n, p in student.named_parameters() if "gate_projection" in n]
    assert len(added) == 3 and all(added)


@pytest.mark.parametrize("name", [name for name, entry in MIXERS.items() if entry.has_gates({})])
def test_every_gate_can_be_learned(name):
    """Decays and write strengths (the delta rule's beta) alike: each has a part of the projection, which moves it."""
    layers = (LayerPlan((), mixer=name, window=9, mix="sum", gate="learned"),) * 3
    student = tiny_student(Plan("llama", layers), tiny_base())
    student(torch.randint(2, 300, (1, 40))).logits.square().sum().backward()
    heads = student.model.layers[0].self_attn.mixer
    widths = [heads.structure.site.head_dim if gate == "channel" else 1 for gate in heads.structure.gates]
    for part in heads.gate_projection.grad.unflatten(0, (3, -1)).split(widths, dim=1):
        assert part.abs().amax((0, 2)).min() > 0


def test_top_level_names_of_all_mixers_are_unique():
    """The portable file puts all modules into one namespace; `portable_source` refuses a name defined twice."""
    portable_source(Plan("llama", tuple(LayerPlan((), name) for name in MIXERS)))


def test_what_a_memory_inside_mom_can_do():
    for inner in MIXERS["mom"].options["inner"].choices:
        options = {"inner": inner}
        assert MIXERS["mom"].has_gates(options) == MIXERS[inner].has_gates({})
        assert MIXERS["mom"].shares_normaliser(options) == MIXERS[inner].shares_normaliser({})


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_outside_starts_as_window_and_sinks(name):
    """To the digit where a scale of zero says so, closely where the past has a small mass."""
    base = tiny_base()
    student = tiny_student(Plan("llama", (LayerPlan((), mixer=name, window=9),) * 3), base)
    ids = torch.randint(2, 300, (1, 60))
    logits = student(ids).logits
    with student.recurrent_branch_off():
        window = student(ids).logits
    exact = not MIXERS[name].shares_normaliser({})
    assert torch.equal(logits, window) if exact else (logits - window).abs().max() < 0.5 * window.std()
