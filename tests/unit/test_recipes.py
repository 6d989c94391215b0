"""Recipes: what is given beside a file, stages, and the recipes that ship."""

import pytest

from linearize.errors import ConfigError
from linearize.settings.loading import load_config, load_recipe, packaged


def test_liger_recipe_reproduces_the_published_settings():
    liger = load_recipe("liger")
    assert (liger.lora.rank, liger.lora.alpha, liger.lora.targets) == (8, 8, ["q_proj", "k_proj", "v_proj"])
    assert (liger.optimizer.lr, liger.optimizer.warmup_fraction, liger.optimizer.schedule) == (1e-3, 0, "constant")
    assert (liger.batch_size, liger.seq_len, liger.tokens) == (8, 1024, 20_000_000)
    assert liger.loss.kind == "ce" and liger.loss.completion_only
    config = load_config("liger")
    assert (config.window, config.sinks, config.mix) == (65, 0, "sum")


def test_stages_given_with_other_keys_keep_their_own():
    stages = [{"name": "distill", "share": 0.5, "seq_len": 128}, {"name": "distill", "share": 0.5, "seq_len": 512}]
    for flags in ({"stages": stages, "seq_len": 256}, {"seq_len": 256, "stages": stages}):
        assert [stage.seq_len for stage in load_recipe("lora", flags).resolved_stages()] == [128, 512]


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


def test_a_key_given_beside_the_file_holds_for_every_stage():
    given = load_recipe("lolcats", {"seq_len": 2048}, ["optimizer.lr=1e-3", "optimizer.mixer_lr=0.5"])
    rates = [(stage.optimizer.lr, stage.optimizer.mixer_lr, stage.seq_len) for stage in given.resolved_stages()]
    assert rates == [(1e-3, 0.5, 2048)] * 2


@pytest.mark.parametrize(("flags", "batch_size"), [({"batch_size": 4}, 4), ({}, 8)])
def test_a_key_given_beside_the_file_lies_over_the_stage_s_own(flags, batch_size):
    assert load_recipe("full", flags).resolved_stages()[-1].batch_size == batch_size


def test_the_loss_of_a_stage_follows_from_its_name():
    with pytest.raises(ConfigError, match="in a recipe of stages their names decide"):
        load_recipe("lolcats", {}, ["loss.kind=ce"])


def test_a_mapping_lies_over_what_is_there():
    merged = load_recipe("lora", {"optimizer": {"lr": 3e-4}, "lora": {"rank": 2}})
    assert (merged.optimizer.lr, merged.optimizer.mixer_lr, merged.lora.alpha) == (3e-4, 1e-3, 32)


@pytest.mark.parametrize(("sets", "completion_only"), [([], True), (["loss.completion_only=false"], False)])
def test_a_stage_called_finetune_trains_on_completions_unless_told_otherwise(sets, completion_only):
    (stage,) = load_recipe("lora", {}, ["stages=[{name: finetune}]", *sets]).resolved_stages()
    assert stage.loss.completion_only is completion_only


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
