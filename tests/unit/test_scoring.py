"""Which heads recall depends on: the gated attention against real conversions, derivatives against differences."""

import dataclasses

import pytest
import torch
from helpers import tiny_base, tiny_student
from torch.nn import functional as F

from linearize.conversion import probes, scoring
from linearize.conversion.head_gates import IMPLEMENTATION, gated_heads
from linearize.modeling.layer_stream import LayerStream
from linearize.plan import LayerPlan, Plan

REACH = {"window": 12, "sinks": 2}
DISTANCES = (20, 60)


def copies(distances=DISTANCES) -> list:
    return [probes.copies_probe(distances, 2, vocabulary=300, start_token=0)]


def text(base):
    ids = torch.randint(2, 300, (2, 50), generator=torch.Generator().manual_seed(3))
    return ids, probes.text_probe(LayerStream(base), ids, **REACH)


def converted_but_one(base, layer: int, head: int):
    layers = [LayerPlan((0, 1, 2))] * 3
    layers[layer] = LayerPlan(tuple(h for h in range(3) if h != head), **REACH)
    return tiny_student(Plan("llama", tuple(layers)), base)


def plain_loss(model, distances=DISTANCES) -> float:
    """Compute the loss on copies with the whole model: the last tokens of a row, from each span the first 8 apart."""
    span, losses = min(96, min(distances)), []
    for ids in copies(distances)[0].rows:
        counted = [
            position
            for number in range(len(distances))
            for position in range(len(ids) - (number + 1) * span + 8, len(ids) - number * span)
        ]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, torch.tensor(counted) - 1]
        losses.append(F.cross_entropy(logits, ids[counted]).item())
    return sum(losses) / len(losses)


def test_a_swap_is_a_conversion_of_one_head():
    base = tiny_base()
    scores = scoring.head_scores(LayerStream(base), copies(), method="swap", **REACH)
    for layer, head in ((0, 1), (2, 2)):
        student = converted_but_one(base, layer, head)
        with student.recurrent_branch_off():
            rise = plain_loss(student) - plain_loss(base)
        assert scores[layer][head] == pytest.approx(rise, abs=1e-5)
    assert max(abs(score) for row in scores for score in row) > 1e-3


def test_a_swap_on_text_is_the_divergence_of_that_conversion():
    base = tiny_base()
    ids, probe = text(base)
    scores = scoring.head_scores(LayerStream(base), [probe], method="swap", **REACH)
    student = converted_but_one(base, 1, 2)
    with torch.no_grad(), student.recurrent_branch_off():
        wanted, got = (model(ids).logits[:, 12:].log_softmax(-1) for model in (base, student))
    divergence = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    assert divergence > 1e-4
    assert scores[1][2] == pytest.approx(divergence, rel=1e-3)


@pytest.mark.parametrize("kind", ["recall", "text"])
def test_the_gradient_is_the_slope_of_the_loss(kind):
    base = tiny_base().double()
    probe = dataclasses.replace(copies((60,))[0] if kind == "recall" else text(base)[1], gates=(0.8,))
    scores, step = scoring.head_scores(LayerStream(base), [probe], method="gradient", **REACH), 3e-3
    with gated_heads(base, **REACH) as attentions, torch.no_grad():
        for attention in attentions:
            attention.head_gates.fill_(0.8)
        for layer, head in ((0, 0), (1, 2)):
            losses = []
            for value in (0.8 - step, 0.8 + step):
                attentions[layer].head_gates[head] = value
                losses.append(sum(probe.losses(LayerStream(base))) / 2)
            attentions[layer].head_gates[head] = 0.8
            assert scores[layer][head] == pytest.approx(-(losses[1] - losses[0]) / (2 * step), rel=2e-2, abs=2e-5)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_lookup_is_the_attention_to_the_token_to_copy():
    base = tiny_base()
    scores = scoring.head_scores(LayerStream(base), copies((60,)), method="lookup", **REACH)
    ids = torch.stack(copies((60,))[0].rows)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = base(ids, output_attentions=True).attentions
    T = ids.shape[1]
    queries = torch.arange(T - 60 + 8 - 1, T - 1)
    for layer, weights in enumerate(attentions):
        looked = weights[:, :, queries, queries + 1 - 60].mean(-1).unflatten(1, (3, 2)).amax(2).mean(0)
        torch.testing.assert_close(torch.tensor(scores[layer]), looked, rtol=1e-4, atol=1e-6)


def test_lookup_in_text_is_the_attention_beyond_the_window():
    base = tiny_base()
    ids, probe = text(base)
    scores = scoring.head_scores(LayerStream(base), [probe], method="lookup", **REACH)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = base(ids, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        beyond = torch.stack([weights[:, :, i, 2 : i - 11].sum(-1) for i in range(12, 50)], -1).mean(-1)
        torch.testing.assert_close(torch.tensor(scores[layer]), beyond.unflatten(1, (3, 2)).amax(2).mean(0))


def test_elimination_lets_the_head_go_that_is_missed_least():
    base = tiny_base()
    rows = torch.randint(2, 300, (3, 1, 50), generator=torch.Generator().manual_seed(3))
    near, *others = (probes.text_probe(LayerStream(base), ids, **REACH) for ids in rows)

    def losses(kept) -> torch.Tensor:
        """Convert for real: return the divergence on the first row, and on the two others; the loss on copies."""
        plan = Plan("llama", tuple(LayerPlan(tuple(h for h in range(3) if (i, h) in kept), **REACH) for i in range(3)))
        student = tiny_student(plan, base)
        found = []
        with torch.no_grad(), student.recurrent_branch_off():
            for ids in rows:
                wanted, got = (model(ids).logits[:, 12:].log_softmax(-1) for model in (base, student))
                found.append((wanted.exp() * (wanted - got)).sum(-1).mean())
            return torch.stack([found[0], (found[1] + found[2]) / 2, torch.tensor(plain_loss(student, (20,)))])

    scores = [[0.3, 0.9, 0.1], [0.8, 0.2, 0.7], [0.0, 0.6, 0.5]]
    every = {(i, h) for i in range(3) for h in range(3)}
    best, stakes = losses(every), losses(set()) - losses(every)
    # this base copies no worse without any head, so that copies count for nothing
    assert stakes[2] < 0 < stakes[:2].min()
    left, went = {(0, 1), (1, 0), (1, 2), (2, 1), (2, 2), (0, 0)}, []
    while len(left) > 3:
        went.append(min(left, key=lambda at: ((losses(left - {at}) - best) / stakes)[:2].sum().item()))
        left.remove(went[-1])
    # the order of the scores would be another
    assert went != [(0, 0), (2, 2), (2, 1)]
    said = []
    turns = scoring.eliminate(
        LayerStream(base), [[near], others, copies((20,))], scores, 3, **REACH, layers=range(3), progress=said.append
    )
    wanted_turns = {**dict.fromkeys(every, 0), **dict.fromkeys(left, 4), **{at: n + 1 for n, at in enumerate(went)}}
    assert {(i, h): turns[i][h] for i, h in every} == wanted_turns
    assert [line.split()[4] for line in said] == [f"{layer}:{head}" for layer, head in went]
    assert base.config._attn_implementation != IMPLEMENTATION


def test_scoring_leaves_the_model_as_it_was():
    base, ids = tiny_base(), torch.arange(2, 60)[None]
    with torch.no_grad():
        before = base(ids).logits
        for method in scoring.METHODS:
            scoring.head_scores(LayerStream(base), [*copies(), text(base)[1]], method=method, **REACH)
        assert torch.equal(base(ids).logits, before)
    assert base.config._attn_implementation != IMPLEMENTATION


def test_results_are_cached_on_disk_where_that_can_be_written(tmp_path, monkeypatch):
    from linearize.checkpoint.result_cache import cached_on_disk

    asked: list[int] = []

    def compute() -> list[int]:
        asked.append(1)
        return [len(asked)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cached_on_disk("kind", {"a": 1}, compute) == cached_on_disk("kind", {"a": 1}, compute) == [1]
    assert cached_on_disk("kind", {"a": 2}, compute) == [2] and cached_on_disk("other", {"a": 1}, compute) == [3]
    (path,) = (tmp_path / "cache" / "linearize" / "other").iterdir()
    for damage in ("", "[]", "{}", "null"):
        path.write_text(damage)
        assert cached_on_disk("other", {"a": 1}, compute) == [len(asked)] and cached_on_disk(
            "other", {"a": 1}, compute
        ) == [len(asked)]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = len(asked)
    assert cached_on_disk("kind", {"a": 1}, compute) == [before + 1] and cached_on_disk("kind", {"a": 1}, compute) == [
        before + 2
    ]
