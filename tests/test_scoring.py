"""Which heads recall depends on: the gated attention against real conversions, derivatives against differences."""

import json

import pytest
import torch
from conftest import tiny_base, tiny_student
from torch.nn import functional as F

from linearize import scoring
from linearize.errors import ConfigError
from linearize.evaluation.recall import recall_task
from linearize.modeling.plan import LayerPlan, Plan
from linearize.placement import recall_share, softmax_heads, top_heads

SETTINGS = {"window": 12, "sinks": 2, "vocabulary": 300, "start_token": 0, "distances": (20, 60), "rows": 2}


def plain_loss(model, distance: int) -> float:
    task = recall_task(distance, 2, 300, 0, scoring.SEED)
    with torch.no_grad():
        logits = model(task.ids).logits[:, -task.counted - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), task.ids[:, -task.counted :].flatten()).item()


def test_a_swap_is_a_conversion_of_one_head():
    base = tiny_base()
    scores = scoring.head_scores(base, method="swap", **SETTINGS)
    for layer, head in ((0, 1), (2, 2)):
        layers = [LayerPlan((0, 1, 2))] * 3
        layers[layer] = LayerPlan(tuple(h for h in range(3) if h != head), window=12, sinks=2)
        student = tiny_student(Plan("llama", tuple(layers)), base)
        with student.recurrent_branch_off():
            rises = [plain_loss(student, d) - plain_loss(base, d) for d in (20, 60)]
        assert scores[layer][head] == pytest.approx(sum(rises) / 2, abs=1e-5)
    assert max(abs(score) for row in scores for score in row) > 1e-3


def test_the_gradient_is_the_slope_of_the_loss(monkeypatch):
    base = tiny_base().double()
    monkeypatch.setattr(scoring, "HALF", (1.0,))
    scores = scoring.head_scores(base, method="gradient", **SETTINGS)
    task, step = [recall_task(d, 2, 300, 0, scoring.SEED) for d in (20, 60)], 1e-4
    with scoring._gated(base, 12, 2) as attentions, torch.no_grad():
        for layer, head in ((0, 0), (1, 2)):
            losses = []
            for value in (1 - step, 1 + step):
                attentions[layer].head_gates[head] = value
                losses.append(sum(scoring._loss(base, t.ids, t.counted).item() for t in task) / 2)
                attentions[layer].head_gates[head] = 1.0
            assert scores[layer][head] == pytest.approx(-(losses[1] - losses[0]) / (2 * step), rel=2e-2, abs=1e-4)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_lookup_is_the_attention_to_the_token_to_copy():
    base = tiny_base()
    scores = scoring.head_scores(base, method="lookup", **{**SETTINGS, "distances": (60,)})
    task = recall_task(60, 2, 300, 0, scoring.SEED)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = base(task.ids, output_attentions=True).attentions
    T = task.ids.shape[1]
    queries = torch.arange(T - task.counted - 1, T - 1)
    for layer, weights in enumerate(attentions):
        looked = weights[:, :, queries, queries + 1 - 60].mean(-1).unflatten(1, (3, 2)).amax(2).mean(0)
        torch.testing.assert_close(torch.tensor(scores[layer]), looked, rtol=1e-4, atol=1e-6)


def test_scoring_leaves_the_model_as_it_was():
    base, ids = tiny_base(), torch.arange(2, 60)[None]
    with torch.no_grad():
        before = base(ids).logits
        for method in scoring.METHODS:
            scoring.head_scores(base, method=method, **SETTINGS)
        assert torch.equal(base(ids).logits, before)
    assert base.config._attn_implementation != scoring.IMPLEMENTATION


def test_top_heads():
    scores = [[0.1, 0.9, 0.0], [0.5, 0.2, 0.3]]
    assert top_heads(scores, 0.5) == ((1,), (0, 2))
    assert top_heads(scores, 0.01) == ((1,), ())
    assert softmax_heads("recall:50%", 2, 3, lambda: scores) == ((1,), (0, 2))
    assert recall_share("recall:12.5%") == recall_share("recall:0.125") == 0.125
    for spec in ("recall:", "recall:0", "recall:100%", "recall:x", "recall:nan"):
        with pytest.raises(ConfigError, match="recall:SHARE"):
            softmax_heads(spec, 2, 3, lambda: scores)
    with pytest.raises(ConfigError, match="no recall can be scored"):
        scoring.head_scores(tiny_base(), **{**SETTINGS, "window": 100})


def test_convert_by_recall(base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = base_folder()
    flags = ["--keep-softmax", "recall:30%", "--window", "12", "--set", "scoring.distances=[40, 60]"]
    code, out, err = cli("plan", base, *flags, "--json")
    assert code == 0 and "scoring key/value heads by recall (gradient)" in err, err
    layers = json.loads(out)["layers"]
    scores = {(layer["layer"], head): score for layer in layers for head, score in enumerate(layer["scores"])}
    kept = {(layer["layer"], head) for layer in layers for head in layer["softmax_heads"]}
    assert kept == set(sorted(scores, key=lambda at: -scores[at])[:3])
    code, text, err = cli("plan", base, *flags)
    assert "scoring key/value heads" not in err and "scores " in text
    code, out, err = cli("convert", base, *flags, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    assert {
        (number, head)
        for number, layer in enumerate(json.loads(out)["plan"]["layers"])
        for head in layer["softmax_heads"]
    } == kept
