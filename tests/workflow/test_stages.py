"""Recipes of stages: their order, resumption over a stage's end, variants of LoRA, optimizers, quantised weights."""

import json
import os
import signal

import pytest
import torch
from helpers import SETTINGS, quiet, weights_of, write_base
from peft import PeftModel
from transformers import AutoTokenizer

from linearize.checkpoint.student import Student
from linearize.data.packing import packed_rows
from linearize.errors import Interrupted
from linearize.modeling.loading import load_student
from linearize.settings.loading import load_config, load_recipe
from linearize.settings.recipe import Lora, Recipe
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


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer_folder):
    """Convert a tiny model once for this file. Only to be read."""
    folder = tmp_path_factory.mktemp("converted")
    base = write_base(folder / "base", tokenizer_folder)
    settings = load_config(None, {"mixer": "hedgehog", "mix": "joint", "window": 12, "sinks": 2, "keep_softmax": "1:0"})
    convert(str(base), settings, out=folder / "out", verify=False, progress=quiet)
    return folder / "out"


@pytest.fixture(scope="module")
def trained(converted, tmp_path_factory):
    """Return a runner that trains a recipe at most once: trained(recipe) -> its output folder, only to be read."""
    outputs = {}

    def call(recipe: Recipe):
        key = recipe.model_dump_json()
        if key not in outputs:
            outputs[key] = tmp_path_factory.mktemp("trained") / "out"
            run(converted, outputs[key], recipe)
        return outputs[key]

    return call


def run(converted, out, recipe, **options):
    options = {"report": quiet, **options}
    return finetune(converted, recipe, recipe_name="staged", out=out, progress=quiet, **options)


def test_stages_run_one_after_the_other(trained):
    assert Student.read(trained(staged())).manifest.finetune.stages == (
        {"name": "transfer", "steps": 3},
        {"name": "distill", "steps": 5},
        {"name": "longcontext", "steps": 2},
    )
    metrics = [json.loads(line) for line in (trained(staged()) / "metrics.jsonl").read_text().splitlines()]
    assert [m["stage"] for m in metrics] == ["transfer"] * 3 + ["distill"] * 5 + ["longcontext"] * 2
    assert [m["step"] for m in metrics] == list(range(1, 11)) and metrics[-1]["tokens"] == 8 * 96 + 2 * 96


def stop_at(number: int):
    """Return a report that interrupts the run at a step, as Ctrl-C does."""
    return lambda step: os.kill(os.getpid(), signal.SIGINT) if step.step == number else None


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_a_stopped_run_goes_on_to_the_same_weights(converted, trained, tmp_path, stop):
    """Inside the first stage, at its very end, and inside the second."""
    with pytest.raises(Interrupted, match=f"step {stop} of 10"):
        run(converted, tmp_path / "broken", staged(), report=stop_at(stop))
    run(converted, tmp_path / "broken", staged())
    assert weights_of(trained(staged())) == weights_of(tmp_path / "broken")


ADALORA = load_recipe("lora", {}, [*SETTINGS, "lora.variant=adalora"])


@pytest.mark.parametrize("stop", [4, 8])
def test_adalora_resumes_to_the_same_weights(converted, trained, tmp_path, stop):
    """While ranks are still moving, and once they are settled."""
    with pytest.raises(Interrupted, match=f"step {stop} of 10"):
        run(converted, tmp_path / "broken", ADALORA, report=stop_at(stop))
    run(converted, tmp_path / "broken", ADALORA)
    assert weights_of(trained(ADALORA)) == weights_of(tmp_path / "broken")


def rank_pattern(folder) -> list[list[bool]]:
    return list(json.loads((folder / "adapter" / "adapter_config.json").read_bytes())["rank_pattern"].values())


def test_adalora_shares_out_its_ranks(trained):
    """Every rank that the budget leaves out has no share in the weights."""
    ranks = rank_pattern(trained(ADALORA))
    assert len(ranks) == 4 * 3 and sum(map(sum, ranks)) == 2 * len(ranks) and all(len(row) == 3 for row in ranks)


def test_adalora_counts_from_where_adapters_train(converted, tmp_path):
    """A transfer stage takes nothing from the steps in which the ranks are shared out."""
    stages = [{"name": "transfer", "share": 0.7}, {"name": "distill", "share": 0.3}]
    recipe = staged(stages=stages, lora={"variant": "adalora", "rank": 2}, tokens=1920)
    run(converted, tmp_path / "out", recipe)
    ranks = rank_pattern(tmp_path / "out")
    assert (
        sum(map(sum, ranks)) == 2 * len(ranks)
        and "(loss attention, then kl)" in (tmp_path / "out" / "README.md").read_text()
    )


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


VARIANTS = ["dora", "rslora", "pissa", "olora", "vera", "adalora"]


def brief(variant: str) -> Recipe:
    return load_recipe("lora", {}, [*SETTINGS, f"lora.variant={variant}", "tokens=192"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_lora_starts_at_the_conversion(trained, variant):
    """The first loss is the untrained conversion's divergence from the base, whatever the adapter."""
    loss, plain = (Student.read(trained(brief(name))).manifest.finetune.first_loss for name in (variant, "lora"))
    assert loss == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_lora_merges_to_what_its_adapter_computes(converted, trained, variant):
    out = trained(brief(variant))
    tokenizer = AutoTokenizer.from_pretrained(converted)
    row = next(packed_rows(["sample"], tokenizer, seq_len=48, text_field="text", completion_only=False, seed=0))
    merged = load_student(out, dtype=torch.float32)
    # the adapter beside the merged weights is the one that they were merged from
    adapted = PeftModel.from_pretrained(load_student(converted, dtype=torch.float32), out / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(row.input_ids).logits, adapted(row.input_ids).logits, rtol=1e-3, atol=1e-3)


GENTLE = [*SETTINGS, "optimizer.lr=0.001", "optimizer.mixer_lr=0.001"]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_train_adapters_for_the_whole_ones(base_folder, tmp_path, quantization):
    settings = load_config(
        None, {"mixer": "hedgehog", "mix": "joint", "window": 12, "sinks": 2, "keep_softmax": "none"}
    )
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


MUON = staged(optimizer={"name": "muon"}, stages=[{"name": "distill"}])


def test_muon_does_not_diverge(trained):
    outcome = Student.read(trained(MUON)).manifest.finetune
    assert outcome.last_loss < outcome.first_loss * 1.5


def test_muon_resumes_to_the_same_weights(converted, trained, tmp_path):
    with pytest.raises(Interrupted):
        run(converted, tmp_path / "half", MUON, report=stop_at(4))
    run(converted, tmp_path / "half", MUON)
    assert weights_of(tmp_path / "half") == weights_of(trained(MUON))


def test_a_share_of_cross_entropy(converted, tmp_path):
    first = {}
    for share in (0.0, 0.5, 1.0):
        loss = {"kind": "kl", "ce_share": share}
        recipe = staged(tokens=96, stages=[{"name": "distill", "loss": loss}])
        first[share] = run(converted, tmp_path / f"out{share}", recipe).manifest.finetune.first_loss
    assert first[0.5] == pytest.approx((first[0.0] + first[1.0]) / 2, rel=1e-4) and first[0.0] < first[1.0]
