"""Every command on the pages of the package, of configs and of recipes runs, at the size of a tiny model."""

import re
import shlex
from pathlib import Path

from helpers import ROOT

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# what makes a command small: the last of a repeated option holds, and --set over all
SMALLER = {
    "plan": ["--set", "window=12"],
    "convert": ["--set", "window=12", "--no-calibrate", "--no-verify"],
    "finetune": ["--seq-len", "32", "--tokens", "64", "--batch-size", "1", "--overwrite"],
}


def commands_of(page: str) -> list[list[str]]:
    """Return the command lines in a page's fenced blocks."""
    text = (ROOT / page / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("linearize ")]


def run_commands(page: str, base: Path, cli) -> set[str]:
    """Run the commands of a page on a tiny base model, and return their names."""
    commands = commands_of(page)
    for name, *arguments in commands:
        arguments = [str(base) if argument == MODEL else argument for argument in arguments]
        code, _, err = cli(name, *arguments, *SMALLER.get(name, []))
        assert code == 0, f"{name} {arguments}: {err}"
    return {name for name, *_ in commands}


def test_every_command_of_the_house_runs(base_folder, cli):
    assert run_commands("linearize", base_folder(), cli) == {"plan", "convert", "list"}


def test_every_command_of_the_configs_runs(base_folder, cli):
    base = base_folder(num_hidden_layers=30)  # as many layers and key/value heads as the config of SmolLM2-135M names
    assert run_commands("configs", base, cli) == {"plan", "convert"}


def test_every_command_of_the_recipes_runs(base_folder, cli):
    base = base_folder()
    assert cli("convert", base, "-o", "linearized/demo", *SMALLER["convert"])[0] == 0
    assert run_commands("recipes", base, cli) == {"finetune"}
