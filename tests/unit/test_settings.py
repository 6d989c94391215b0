"""Settings: what a user gives in files and on the command line, and what follows from it."""

import pytest


def test_shipped_configs_and_recipes_load():
    from linearize.settings.loading import load_config, load_recipe, packaged

    assert {"lora", "liger"} <= packaged("recipes").keys() and {"liger", "smollm2-135m"} <= packaged("configs").keys()
    for name in packaged("recipes"):
        assert load_recipe(name).description
    for name in packaged("configs"):
        assert load_config(name).description


def test_a_mixer_on_the_command_line_leaves_the_options_of_the_config_s_mixer():
    from linearize.settings.loading import load_config

    assert load_config("liger").mixer_options == {"gate_logit_normalizer": 16.0}
    assert load_config("liger", {"mixer": "gla"}).mixer_options == {"gate_logit_normalizer": 16.0}
    assert load_config("liger", {"mixer": "linear"}).mixer_options == {}


@pytest.mark.parametrize(
    ("given", "mixer", "mix"),
    [
        ({}, "vq", "joint"),
        ({"mix": "sum"}, "gla", "sum"),
        ({"mix": "outside"}, "gla", "outside"),
        ({"mixer": "gla"}, "gla", "outside"),
        ({"mixer": "hedgehog", "mix": "joint"}, "hedgehog", "joint"),
    ],
)
def test_of_mixer_and_mix_each_follows_from_the_other(given, mixer, mix):
    from linearize.settings.loading import load_config

    config = load_config(None, given)
    assert (config.mixer, config.mix) == (mixer, mix)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("plan", ["--set", "layers={"], ["layers={", "not valid YAML"]),
        ("plan", ["--set", "mixer=[a]"], ["mixer", "['a']"]),
        ("plan", ["--window", str(10**20)], ["window"]),
        ("plan", ["--set", "windo=3", "--set", "mix_options.lg=2", "--set", "scoring.rws=1"],
         ["did you mean 'window'", "mix_options.lg", "scoring.rws"]),
        ("finetune", ["--set", "stages=[{name: distill, loss: 3}]"], ["stages.0.loss", "got 3"]),
        ("finetune", ["--set", "loss=kl", "--set", "stages=[{name: distill}]"], ["loss", "'kl'"]),
        ("finetune", ["--set", "stages=[{name: [a]}]"], ["stages.0.name"]),
        ("finetune", ["--tokens", "1e999"], ["tokens", "1e999"]),
        ("finetune", ["--set", "optimizer.betas=[2, 3]"], ["optimizer.betas", "less than 1"]),
        ("finetune", ["--lr", "inf"], ["optimizer.lr", "finite"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(base_folder, cli, command, flags, words):
    code, out, err = cli(command, base_folder(), *flags)
    assert code == 2 and out == "" and "Traceback" not in err, err
    for word in words:
        assert word in err


def test_every_mistake_of_a_config_is_named_at_once(base_folder, cli, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("windo: 3\nsinks: many\nmix_options: {foo: 1}\nlayers: {'1': {windo: 3, mixer_options: {a: 1}}}\n")
    code, _, err = cli("plan", base_folder(), "--config", path)
    assert code == 2
    for word in ("windo:", "sinks:", "mix_options.foo", "layers.1.windo", "layers.1.mixer_options.a"):
        assert word in err
    path.write_text("window: 3\nsinks: 2\nwindow: 5\n")
    code, _, err = cli("plan", base_folder(), "--config", path)
    assert code == 2 and "'window' stands twice" in err


def test_yaml_reads_what_people_mean(tmp_path):
    """1:0 is a layer and a head, no number of base 60; 1e-3 is a number; merge keys work; a key twice is refused."""
    from linearize.errors import ConfigError
    from linearize.settings.loading import load_config, load_recipe
    from linearize.settings.yaml_file import read_yaml

    assert load_config(None, sets=["keep_softmax=18:2"]).keep_softmax == "18:2"
    assert load_recipe("lora", sets=["optimizer.lr=1e-3"]).optimizer.lr == 0.001
    path = tmp_path / "config.yaml"
    path.write_text("keep_softmax: 1:0\nlayers:\n  '0': &short {window: 32, sinks: 2}\n  '1': {<<: *short, sinks: 3}\n")
    config = load_config(str(path))
    assert config.keep_softmax == "1:0" and [config.layers[i].sinks for i in "01"] == [2, 3]
    assert config.layers["1"].window == 32
    for text in ("a: 1\na: 2", "layers: {0: {window: 1}, '0': {window: 2}}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="stands twice"):
            read_yaml(path)
