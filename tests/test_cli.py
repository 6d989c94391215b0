"""The command line: light, pure in JSON, the same in help and in README."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = ["convert", "plan", "finetune", "eval", "run", "bench", "list", "doctor"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_light_and_complete(command):
    script = (
        "import sys; from linearize.cli.app import run\n"
        f"code = run({[*command, '--help']!r})\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'safetensors', 'rich', 'yaml'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), code)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert "HEAVY [] 0" in out
    if command:
        shown = out[out.index("Examples") :]
        assert len(re.findall(r"^\s*(linearize|torchrun)", shown, re.MULTILINE)) == 3
        assert "Exit codes" in shown and "--json" in out


@pytest.mark.parametrize("kind", ["mixers", "families", "recipes", "configs"])
def test_list(cli, kind):
    code, out, _ = cli("list", kind, "--json")
    rows = json.loads(out)
    assert code == 0 and rows and all(row["name"] for row in rows)
    code, text, _ = cli("list", kind)
    assert code == 0 and all(row["name"] in text for row in rows)


def test_list_says_why_a_family_is_refused(cli):
    rows = {row["name"]: row for row in json.loads(cli("list", "families", "--json")[1])}
    assert rows["llama"]["status"] == "supported" and rows["gpt2"]["status"] == "refused" and rows["gpt2"]["why"]


def test_unknown_kind_and_command(cli):
    assert cli("list", "mixer")[0] == 2
    assert cli("convrt")[0] == 2


def test_doctor(cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] and found["advice"]
    assert {"devices", "kernels", "memory", "disk", "hub"} <= found.keys()


def test_every_command_prints_one_document(base_folder, cli, tmp_path):
    flags = ["--set", "seq_len=300", "--set", "tokens=300", "--set", "lora.rank=1"]
    for arguments in (
        ("plan", base_folder(), "--json"),
        ("convert", tmp_path / "base", "-o", "linearized/a", "--window", "8", "--no-verify", "--json"),
        ("finetune", *flags, "--json"),
        ("eval", "--lengths", "32", "--recall", "8", "--max-tokens", "64", "--json"),
    ):
        code, out, err = cli(*arguments)
        assert code == 0, err
        assert isinstance(json.loads(out), dict)


def test_a_non_zero_failure_is_never_silent(cli, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the unforeseen")

    monkeypatch.setattr("linearize.doctor.examine", broken)
    code, out, err = cli("doctor", "--json")
    assert code == 1 and "the unforeseen" in err and json.loads(out)["exit_code"] == 1


def test_out_of_memory_has_its_code(cli, monkeypatch):
    def hungry(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("linearize.doctor.examine", hungry)
    assert cli("doctor")[0] == 5


def test_readme_commands_exist():
    """Every linearize command line in the README parses: known command, known options."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\s*(?:\$ )?linearize (\w+)(.*)$", text, re.MULTILINE)
    assert {name for name, _ in lines} >= {"convert", "finetune", "eval"}
    for name, rest in lines:
        assert name in COMMANDS, name
        shown = subprocess.run(
            [sys.executable, "-m", "linearize", name, "--help"],
            capture_output=True,
            text=True,
            env={"COLUMNS": "200", "PATH": ""},
        ).stdout
        for option in re.findall(r"(?<=\s)--[a-z-]+", rest):
            assert option in shown, f"{name} {option}"


def test_shipped_configs_and_recipes_load():
    from linearize.recipe import load_config, load_recipe, packaged

    assert {"lora", "liger"} <= packaged("recipes").keys() and {"liger", "smollm2-135m"} <= packaged("configs").keys()
    for name in packaged("recipes"):
        assert load_recipe(name).description
    for name in packaged("configs"):
        assert load_config(name).description


def test_bench_measures_every_structure(cli):
    from linearize.mixers.registry import MIXERS

    code, out, _ = cli("bench", "ops", "--lengths", "40", "--heads", "2", "--dim", "4", "--repeats", "1", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["structure"] for row in rows] == list(MIXERS)
    assert all(row["ratio"] == row["structure_seconds"] / row["softmax_seconds"] > 0 for row in rows)
    code, _, err = cli("bench", "ops", "--only", "gal")
    assert code == 2 and "did you mean 'gla'" in err


def test_a_mixer_on_the_command_line_leaves_the_options_of_the_config_s_mixer():
    from linearize.recipe import load_config

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
    from linearize.recipe import load_config

    config = load_config(None, given)
    assert (config.mixer, config.mix) == (mixer, mix)
