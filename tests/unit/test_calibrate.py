"""Calibration: what is observed is what the base does, and what is fitted is nearer to it than window + sinks."""

import pytest
import torch
from helpers import student_of, tiny_base

from linearize.conversion.calibrate import PARTS, choose_part
from linearize.mixers.registry import MIXERS
from linearize.modeling.context import context_of
from linearize.modeling.fit_mix import fit_mix
from linearize.modeling.layer_stream import LayerStream
from linearize.ops.window import Scores


@torch.no_grad()
def test_an_observed_model_is_its_base():
    base, ids = tiny_base(), torch.randint(2, 300, (2, 40))
    student, seen = student_of(base), []
    with student.observed(seen.append):
        logits = student(ids).logits
    assert torch.equal(logits, base(ids).logits)
    assert [(o.layer, o.target.shape[2], o.k.shape[2]) for o in seen] == [(0, 6, 3), (1, 4, 2), (2, 2, 1)]
    with student.observed(lambda o: o.target):  # put back what was there
        torch.testing.assert_close(student(ids).logits, logits)
    plain = student(ids).logits
    with student.observed(lambda o: o.run()):
        torch.testing.assert_close(student(ids).logits, plain)
    assert not torch.allclose(plain, logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mixer", "mix"),
    [
        (name, mix)
        for name in ("gla", "vq", "gated_deltanet", "hedgehog")
        for mix in MIXERS[name].mixes
        if mix != "joint" or MIXERS[name].shares_normaliser({})
    ],
)
def test_the_mix_is_fitted_head_by_head(mixer, mix):
    """No head ends further from the base's attention than with window + sinks alone, where nothing can be chosen."""
    student = student_of(tiny_base(), mixer=mixer, mix=mix, mix_options={"learned": True} if mix == "sum" else {})
    errors = []

    def fit(o):
        branch = o.heads
        branch.structure.fit(*(x.flatten(0, 1) for x in (o.q, o.q_rotary, o.k)), o.scores.scale)
        context = context_of(o.k_rotary, o.v, branch.recurrent_inputs(o.k, o.hidden_states), sinks=2)
        errors.append(fit_mix(branch, o.q, o.q_rotary, context, o.target, o.scores))
        start = 0 if mix == "sum" else branch.window
        difference = (o.run() - o.target)[:, start:].square().sum((0, 1, 3))
        torch.testing.assert_close(
            difference / o.target[:, start:].square().sum((0, 1, 3)), errors[-1][1], rtol=1e-3, atol=1e-5
        )

    with student.observed(fit):
        student(torch.randint(2, 300, (1, 200)))
    assert len(errors) == 3
    before, after = (torch.cat([pair[i] for pair in errors]) for i in (0, 1))
    assert (after <= before + 1e-5).all() and (after < before - 1e-5).any()


@torch.no_grad()
def test_clusters_of_keys_stand_for_the_keys_in_them():
    """A past of a few repeated keys is stored in codes without loss: the codes are those keys."""
    student = student_of(tiny_base(), mixer="vq", mix="joint", mixer_options={"codes": 4})
    o = []
    with student.observed(o.append):
        student(torch.randint(2, 300, (1, 120)))
    branch = o[0].heads
    keys = 3 * torch.randn(4, 3, 8)
    k = keys[torch.randint(4, (120,))][None]
    q = torch.randn(1, 120, 6, 8)
    branch.structure.fit(q[0], q[0], k[0], 0.3)
    branch.log_mass.zero_()
    v = torch.randn(1, 120, 3, 8)
    context = context_of(k, v, branch.recurrent_inputs(k, None), sinks=2)
    output, _ = branch(q, q, context, scores=Scores(0.3), state=None)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("mixer", "options"), [("gla", {"log_mass": 1.0}), ("gated_deltanet", {"branch_scale": 2.0})])
def test_the_whole_model_has_the_last_word(mixer, options):
    """The part nearest to the base stays, and its divergence is the one that the model then has."""
    student = student_of(tiny_base(), mixer=mixer, mix_options=options)
    branches = [attention.mixer for _, attention in student.linear_attentions()]
    before = [branch.state_dict() for branch in branches]
    before = [{name: value.clone() for name, value in state.items()} for state in before]
    ids = torch.randint(2, 300, (1, 60), generator=torch.Generator().manual_seed(1))

    def divergence() -> float:
        with student.softmax_attention():
            target = student(ids).logits[0, 8:].log_softmax(-1)
        return (target.exp() * (target - student(ids).logits[0, 8:].log_softmax(-1))).sum(-1).mean().item()

    found = {}
    for part in PARTS:
        for branch, state in zip(branches, before):
            branch.load_state_dict(state)
            branch.scale(part)
        found[part] = divergence()
    for branch, state in zip(branches, before):
        branch.load_state_dict(state)
    with student.recurrent_branch_off():
        window = divergence()
    part, alone, chosen = choose_part(LayerStream(student), branches, ids[0], 8)
    assert part == min(found, key=found.get) and chosen == pytest.approx(found[part], rel=1e-3)
    assert alone == pytest.approx(window, rel=1e-3) and divergence() == pytest.approx(chosen, rel=1e-3)


def test_a_fit_comes_out_the_same_however_threads_share_its_sums():
    """Queries of low rank make the turn ill-conditioned, as in the first layers of a real model."""
    branch = (
        student_of(tiny_base(), mixer="vq", mix="joint", mixer_options={"codes": 8}).model.layers[0].self_attn.mixer
    )
    heads, dim = len(branch.site.heads), branch.site.head_dim
    torch.manual_seed(0)
    q = (torch.randn(4000, heads * branch.site.group, 2) @ torch.randn(2, dim)).bfloat16()
    k = torch.randn(4000, heads, dim).bfloat16()
    before, fitted = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            branch.structure.fit(q, q.roll(1, -1), k, 0.3)
            fitted.append([x.clone() for x in branch.structure.parameters()])
    finally:
        torch.set_num_threads(before)
    for others in fitted[1:]:
        assert all(map(torch.equal, fitted[0], others))
