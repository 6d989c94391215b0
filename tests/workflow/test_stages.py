"""Recipes of stages: attention transfer, window dropout, resumption over a stage's end, variants of LoRA, optimizers."""

import json

import pytest
import torch
from helpers import SETTINGS, quiet, student_of, tiny_base, weights_of
from peft import PeftModel
from transformers import AutoTokenizer

from linearize.data.packing import Batch, packed_rows
from linearize.errors import ConfigError, Interrupted
from linearize.modeling.linear_heads import LinearHeads
from linearize.modeling.loading import load_student
from linearize.settings.loading import load_config, load_recipe, packaged
from linearize.settings.recipe import Lora, Recipe
from linearize.training.transfer import transfer_backward
from linearize.training.window_dropout import window_dropout
from linearize.workflows.convert import convert
from linearize.workflows.finetune import finetune

STAGES = [
    {"name": "transfer", "share": 0.3, "optimizer": {"mixer_lr": 0.02}},
    {"name": "distill", "share": 0.5, "window_dropout": 0.5},
    {"name": "longcontext", "share": 0.2, "seq_len": 96, "batch_size": 1},
]


def staged(**changes) -> Recipe:
    around = {"seq_len": 48, "batch_size": 2, "tokens": 960, "checkpoint_every": 2, "lora": {"rank": 2}}
    return Recipe.model_validate({**around, "stages": STAGES, **changes})


@pytest.fixture
def converted(base_folder, tmp_path):
    out = tmp_path / "converted"
    settings = load_config(None, {"mixer": "hedgehog", "mix": "joint", "window": 12, "sinks": 2, "keep_softmax": "1:0"})
    convert(str(base_folder()), settings, out=out, verify=False, progress=quiet)
    return out


def run(converted, out, recipe, **options):
    options = {"report": quiet, **options}
    return finetune(converted, recipe, recipe_name="staged", out=out, progress=quiet, **options)


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


def test_stages_run_one_after_the_other(converted, tmp_path):
    result = run(converted, tmp_path / "out", staged())
    assert result.manifest.finetune.stages == (
        {"name": "transfer", "steps": 3},
        {"name": "distill", "steps": 5},
        {"name": "longcontext", "steps": 2},
    )
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [m["stage"] for m in metrics] == ["transfer"] * 3 + ["distill"] * 5 + ["longcontext"] * 2
    assert [m["step"] for m in metrics] == list(range(1, 11)) and metrics[-1]["tokens"] == 8 * 96 + 2 * 96


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_a_stopped_run_goes_on_to_the_same_weights(converted, tmp_path, stop):
    """Inside the first stage, at its very end, and inside the second."""
    import os
    import signal

    def interrupt(step):
        if step.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    run(converted, tmp_path / "whole", staged())
    with pytest.raises(Interrupted, match=f"step {stop} of 10"):
        run(converted, tmp_path / "broken", staged(), report=interrupt)
    run(converted, tmp_path / "broken", staged())
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "broken")


@pytest.mark.parametrize("stop", [4, 8])
def test_adalora_shares_out_its_ranks_and_resumes(converted, tmp_path, stop):
    """While ranks are still moving, and once they are settled. Every rank that the budget leaves out has no share in the
    weights."""
    import os
    import signal

    def interrupt(step):
        if step.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = load_recipe("lora", {}, [*SETTINGS, "lora.variant=adalora"])
    run(converted, tmp_path / "whole", recipe)
    with pytest.raises(Interrupted, match=f"step {stop} of 10"):
        run(converted, tmp_path / "broken", recipe, report=interrupt)
    run(converted, tmp_path / "broken", recipe)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "broken")
    ranks = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_bytes())["rank_pattern"]
    kept = [sum(row) for row in ranks.values()]
    assert len(kept) == 4 * 3 and sum(kept) == 2 * len(kept) and all(len(row) == 3 for row in ranks.values())


def test_adalora_counts_from_where_adapters_train(converted, tmp_path):
    """A transfer stage takes nothing from the steps in which the ranks are shared out."""
    stages = [{"name": "transfer", "share": 0.7}, {"name": "distill", "share": 0.3}]
    recipe = staged(stages=stages, lora={"variant": "adalora", "rank": 2}, tokens=1920)
    run(converted, tmp_path / "out", recipe)
    ranks = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_bytes())["rank_pattern"]
    kept = [sum(row) for row in ranks.values()]
    assert sum(kept) == 2 * len(kept) and "(loss attention, then kl)" in (tmp_path / "out" / "README.md").read_text()


def test_adalora_beside_transfer_alone_changes_no_weight(converted, tmp_path):
    recipe = staged(stages=[{"name": "transfer"}], lora={"variant": "adalora", "rank": 2})
    run(converted, tmp_path / "out", recipe)
    before, after = (load_student(folder, dtype=torch.float32).state_dict() for folder in (converted, tmp_path / "out"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(".mixer." in name for name in changed)


def test_orthogonality_is_the_gradient_of_the_papers_penalty(converted):
    from linearize.training.adalora import ORTHOGONALITY, add_orthogonality
    from linearize.training.model import add_adapters

    model = add_adapters(load_student(converted, dtype=torch.float32), Lora(variant="adalora", rank=2), steps=10)
    factors = {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    grams = [p @ p.T if ".lora_A." in n else p.T @ p for n, p in factors.items()]
    penalty = ORTHOGONALITY * sum((g - torch.eye(3)).norm() for g in grams) / len(grams)
    wanted = torch.autograd.grad(penalty, list(factors.values()))
    for p in factors.values():
        p.grad = torch.zeros_like(p)
    add_orthogonality(model)
    for p, gradient in zip(factors.values(), wanted):
        torch.testing.assert_close(p.grad, gradient)


def test_transfer_trains_the_added_parameters_alone(converted, tmp_path):
    out = tmp_path / "out"
    run(converted, out, staged(stages=[{"name": "transfer", "optimizer": {"mixer_lr": 0.05}}], tokens=3000))
    before, after = (load_student(folder, dtype=torch.float32).state_dict() for folder in (converted, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mixer." in name for name in changed)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("variant", ["dora", "rslora", "pissa", "olora", "vera", "adalora"])
def test_variants_of_lora_start_at_the_conversion_and_merge(converted, tmp_path, variant):
    recipe = load_recipe("lora", {}, [*SETTINGS, f"lora.variant={variant}", "tokens=192"])
    result = run(converted, tmp_path / "out", recipe)
    plain = run(converted, tmp_path / "plain", load_recipe("lora", {}, [*SETTINGS, "tokens=192"]))
    # the first loss is the untrained conversion's divergence from the base, whatever the adapter
    assert result.manifest.finetune.first_loss == pytest.approx(plain.manifest.finetune.first_loss, rel=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    row = next(packed_rows(["sample"], tokenizer, seq_len=48, text_field="text", completion_only=False, seed=0))
    merged = load_student(tmp_path / "out", dtype=torch.float32)
    # what is kept beside the merged weights is the adapter that they were merged from
    adapted = PeftModel.from_pretrained(load_student(converted, dtype=torch.float32), tmp_path / "out" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(row.input_ids).logits, adapted(row.input_ids).logits, rtol=1e-3, atol=1e-3)


GENTLE = [*SETTINGS, "optimizer.lr=0.001", "optimizer.mixer_lr=0.001"]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_train_adapters_for_the_whole_ones(base_folder, tmp_path, quantization):
    settings = load_config(None, {"mixer": "hedgehog", "mix": "joint", "window": 12, "sinks": 2})
    # as wide as bitsandbytes' kernels ask for
    base = base_folder(hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    converted = tmp_path / "converted"
    convert(str(base), settings, out=converted, verify=False, progress=quiet)
    losses = {}
    for kind in (quantization, None):
        value = "null" if kind is None else kind
        recipe = load_recipe("lora", {}, [*GENTLE, f"quantization={value}", "lora.targets=['v_proj']"])
        losses[kind] = run(converted, tmp_path / str(kind), recipe).manifest.finetune.last_loss
    assert losses[quantization] != losses[None] and losses[quantization] == pytest.approx(losses[None], rel=0.2)
    before, after = (load_student(folder, dtype=torch.float32) for folder in (converted, tmp_path / quantization))
    adapted = PeftModel.from_pretrained(
        load_student(converted, dtype=torch.float32), tmp_path / quantization / "adapter"
    )
    ids = torch.randint(300, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-3)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert any("v_proj" in name for name in changed)
    assert all("v_proj" in name or ".mixer." in name for name in changed)


def test_eight_bit_moments(converted, tmp_path):
    eight = run(converted, tmp_path / "eight", load_recipe("lora", {}, [*GENTLE, "optimizer.name=adamw8bit"]))
    plain = run(converted, tmp_path / "plain", load_recipe("lora", {}, GENTLE))
    assert weights_of(tmp_path / "eight") != weights_of(tmp_path / "plain")
    assert eight.manifest.finetune.last_loss == pytest.approx(plain.manifest.finetune.last_loss, rel=0.05)


def test_muon_for_matrices(converted, tmp_path):
    result = run(converted, tmp_path / "out", staged(optimizer={"name": "muon"}, stages=[{"name": "distill"}]))
    assert result.manifest.finetune.last_loss < result.manifest.finetune.first_loss * 1.5
    with pytest.raises(Interrupted):
        run(
            converted,
            tmp_path / "half",
            staged(optimizer={"name": "muon"}, stages=[{"name": "distill"}]),
            report=_stop_at(4),
        )
    run(converted, tmp_path / "half", staged(optimizer={"name": "muon"}, stages=[{"name": "distill"}]))
    assert weights_of(tmp_path / "half") == weights_of(tmp_path / "out")


def _stop_at(number):
    import os
    import signal

    return lambda step: os.kill(os.getpid(), signal.SIGINT) if step.step == number else None


def test_a_share_of_cross_entropy(converted, tmp_path):
    first = {}
    for share in (0.0, 0.5, 1.0):
        loss = {"kind": "kl", "ce_share": share}
        recipe = staged(tokens=96, stages=[{"name": "distill", "loss": loss}])
        first[share] = run(converted, tmp_path / f"out{share}", recipe).manifest.finetune.first_loss
    assert first[0.5] == pytest.approx((first[0.0] + first[1.0]) / 2, rel=1e-4) and first[0.0] < first[1.0]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"stages": [{"name": "transfr"}]}, "stages.0.name"),
        ({"stages": [{"name": "distill", "optimizer": {"lrr": 1}}]}, "stages.0.optimizer.lrr"),
        ({"stages": [{"name": "distill", "share": 0.5}]}, "shares add up to 0.5"),
        ({"stages": [{"name": "distill", "share": 0.5}, {"name": "transfer", "share": 0.5}]}, "only as the first"),
        ({"tokens": "many"}, "tokens: got 'many'"),
        ({"quantization": "nf4", "lora": {"variant": "pissa"}}, "pissa starts from whole weights"),
        ({"quantization": "int4"}, "'int8' or 'nf4'"),
    ],
)
def test_bad_stages(tmp_path, sets, message):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sets))
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_what_is_given_beside_the_file_holds_for_every_stage():
    given = load_recipe("lolcats", {"seq_len": 2048}, ["optimizer.lr=1e-3", "optimizer.mixer_lr=0.5"])
    rates = [(stage.optimizer.lr, stage.optimizer.mixer_lr, stage.seq_len) for stage in given.resolved_stages()]
    assert rates == [(1e-3, 0.5, 2048)] * 2
    assert load_recipe("full", {"batch_size": 4}).resolved_stages()[-1].batch_size == 4
    assert load_recipe("full").resolved_stages()[-1].batch_size == 8
    with pytest.raises(ConfigError, match="in a recipe of stages their names decide"):
        load_recipe("lolcats", {}, ["loss.kind=ce"])
    # a mapping lies over what is there
    merged = load_recipe("lora", {"optimizer": {"lr": 3e-4}, "lora": {"rank": 2}})
    assert (merged.optimizer.lr, merged.optimizer.mixer_lr, merged.lora.alpha) == (3e-4, 1e-3, 32)
    # completion_only is what a stage called finetune starts from, not what it insists on
    stages = ["stages=[{name: finetune}]"]
    assert load_recipe("lora", {}, stages).resolved_stages()[0].loss.completion_only
    assert (
        not load_recipe("lora", {}, [*stages, "loss.completion_only=false"]).resolved_stages()[0].loss.completion_only
    )


def test_every_packaged_recipe_trains_the_default_conversion():
    default = load_config(None)
    for name in packaged("recipes"):
        load_recipe(name).check_leaves_window(default.mix, default.window, default.sinks)


def test_every_packaged_recipe_and_config_loads():
    for name in packaged("recipes"):
        assert load_recipe(name).description
    for name in packaged("configs"):
        assert load_config(name).description
    assert load_recipe("lora", {"tokens": "300K"}).tokens == 300_000
    assert load_recipe("full", {"tokens": "1.5M"}).tokens == 1_500_000
