"""Run every command of every page on a tiny model, and every Python example; nothing that a page shows is untested.

A page's commands are the lines of its ``console`` and indented blocks, and the commands in its running text. Each is
first parsed as it stands, then run in one folder with the tiny model of `workspace`, with the words, values and flags
of the tables below. A command that cannot be run here stands in NOT_RUN with the reason, and is parsed all the same.
"""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT, tiny_base
from typer.main import get_command

from linearize.cli.app import app, run
from linearize.data.samples import SAMPLES

PAGES = sorted(
    path
    for pattern in ("*.md", "linearize/**/README.md", "recipes/*.md", "configs/*.md", "tests/*.md", "scripts/**/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = ("linearize", "python", "bash", "torchrun", "pip", "pre-commit", "git")

# what a page names, and what stands in for it in the workspace
WORDS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "base",
    "MODEL": "base",
    "FOLDER": "base",
    "OUT": "student",
    "STUDENT": "student",
    "./model": "base",
    "model.gguf": "base",
    "tiny-qwen3": "base",
    "smollm2-135m": "small.yaml",
    # heads that the tiny model has, where scoring them would take long or the page's own do not exist
    "recall:6.7%": "1:0",
    "recall:12.5%": "1:0",
    "recall:13.3%": "1:0",
}
# what a Python example names, and what stands in for it
PYTHON = {
    '"./model"': '"base"',
    '"OUT"': '"student"',
    '"smollm2-lora"': '"student"',
    '"smollm2-135m"': '"small.yaml"',
    '"lora"': '"small-recipe.yaml"',
    '"quick"': "linearize.Suite(lengths=(64,), recall=(32,), max_tokens=128)",
}
# files that a page's commands read: a copy of the packaged text under the page's own name
TEXTS = ("corpus.jsonl", "wikitext.txt", "valid.txt")
# values that make a command small
VALUES = {
    "--tokens": "300",
    "--seq-len": "150",
    "--batch-size": "1",
    "--lengths": "64",
    "--max-tokens": "128",
    "--recall": "32",
    "--recall-rows": "1",
    "--window": "16",
    "--softmax-window": "32",
    "--passkey": "128",
    "--passkey-rows": "1",
}
# flags that make a command small where the page does not give them
FLAGS = {
    "plan": ["--window", "16", "--keep-softmax", "1:0"],
    "convert": ["--no-verify", "--overwrite", "--no-calibrate", "--window", "16", "--keep-softmax", "1:0"],
    "finetune": ["--overwrite", "--data", "corpus.jsonl", "--tokens", "300", "--seq-len", "150", "--batch-size", "1"],
    "eval": [
        "--data", "corpus.jsonl", "--lengths", "64", "--max-tokens", "128",
        "--recall", "32", "--recall-rows", "1", "--only", "perplexity,recall",
    ],
    "bench": ["--lengths", "32", "--repeats", "1"],
    "scores": ["--window", "16"],
}  # fmt: skip
SWITCHES = ("--no-verify", "--overwrite", "--no-calibrate")
SMALL_SUITE = (
    "suite: quick, only: 'perplexity,recall', data: [corpus.jsonl], lengths: [64], recall: [32], max_tokens: 128"
)
SMALL_RECIPE = "{tokens: 300, seq_len: 150, data: [corpus.jsonl]}\n"
SMALL_CONFIG = "{window: 16, keep_softmax: '1:0', calibration: {when: never}}\n"
# commands that are parsed but not run, by their first words
NOT_RUN = {
    "bash scripts/check.sh": "type checking takes most of a minute; scripts/test.sh runs it before the tests",
    "bash scripts/demo.sh": "fetches the real model, minutes",
    "bash scripts/test.sh": "is the run that this test is part of",
    "bash scripts/setup.sh": "installs from a package index",
    "pip install": "installs from a package index",
    "pre-commit": "installs from a package index",
    "python scripts/compare_methods.py run": "hours",
    "python scripts/structures.py": "hours",
    "python scripts/compare_scoring.py": "minutes on the real model",
    "python scripts/make_synthetic.py": "writes 4 GiB",
    "python scripts/bench.py": "minutes on the real model",
    "python scripts/train_tiny.py": "minutes",
    "python -m pytest": "is the run that this test is part of",
}


def commands_of(text: str) -> list[str]:
    """Return the commands of a page in their order, each on one line without its prompt and its comment.

    In running text, two words (`linearize eval`) name a command and are none; NAME.py stands for any script.
    """
    text = text.replace("\\\n", " ")
    blocks = re.compile(
        r"^```(\w*)\n(.*?)^```|((?:^    .*\n)+)|`((?:linearize|python) [^` \n]+ [^`\n]+)`", re.MULTILINE | re.DOTALL
    )
    commands = []
    for match in blocks.finditer(text):
        language, fenced, indented, inline = match.groups()
        if fenced is not None and language not in ("console", "bash", "sh"):
            continue
        for line in (fenced or indented or inline).splitlines():
            line = line.strip().removeprefix("$ ")
            if line.split(" ")[0] in PROGRAMS and "…" not in line and "NAME.py" not in line:
                commands.append(shlex.join(shlex.split(line, comments=True)))
    return commands


def blocks_of(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a page that are marked with `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


class Parsed(Exception):
    """Raised in place of a script's work, once its arguments are parsed."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as it stands, by the program's own parser; fail where that refuses it."""
    program, *words = shlex.split(command)
    if program in ("python", "torchrun") and "-m" in words and "linearize" in words:
        program, words = "linearize", words[words.index("linearize") + 1 :]
    if program == "linearize":
        if words and not words[0].startswith("-"):
            get_command(app).commands[words[0]].make_context(words[0], list(words[1:]))
    elif program in ("python", "bash") and words[0].endswith((".py", ".sh")):
        assert (ROOT / words[0]).is_file(), command
        if words[0].endswith(".py"):
            run_script(words, monkeypatch, only_parse=True)


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch, only_parse: bool = False) -> None:
    """Run a script of the repository in this process, or stop it where it has parsed its arguments."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
        patch.syspath_prepend(str(ROOT / "scripts"))
        if only_parse:
            parse_args = argparse.ArgumentParser.parse_args

            def stop(parser: argparse.ArgumentParser, *arguments: object) -> None:
                parse_args(parser, *arguments)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Parsed):
                runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")


def in_small(words: list[str]) -> list[str]:
    """Return a linearize command with the words, values and flags that make it small."""
    small = [with_small_lengths(WORDS.get(word, word)) for word in words]
    for position, word in enumerate(small[:-1]):
        if word in VALUES:
            small[position + 1] = VALUES[word]
    flags = iter(FLAGS.get(small[0], []))
    for flag in flags:
        setting = [flag] if flag in SWITCHES else [flag, next(flags)]
        if flag not in small:
            small += setting
    return small


def with_small_lengths(text: str) -> str:
    """Return the text with its metrics at the small lengths that the tables above give."""
    return re.sub(r"\brecall@\d+", "recall@32", re.sub(r"\b(perplexity|kl|agreement)@\d+", r"\1@64", text))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer_folder):
    """Make a folder with the tiny base model `base`, its conversion `student` and the texts that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    tiny_base("gqa").save_pretrained(folder / "base")
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / "base" / path.name)
    lines = SAMPLES["sample-eval"].read_text(encoding="utf-8").splitlines()[:4]
    for name in TEXTS:
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "small.yaml").write_text(SMALL_CONFIG)
    (folder / "small-recipe.yaml").write_text(SMALL_RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(in_small(["convert", "base", "-o", "student"])) == 0
    return folder


@pytest.fixture(scope="module")
def commands_run():
    """Hold the commands that ran on some page; what is the same in small runs once."""
    return set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_runs(page, workspace, commands_run, monkeypatch, capsys):
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(workspace)
    write_settings(text)
    for command in commands_of(text):
        parse(command, monkeypatch)
        if any(command.startswith(prefix) for prefix in NOT_RUN):
            continue
        program, *words = shlex.split(command)
        if program == "python":
            run_script(words, monkeypatch)
            continue
        assert program == "linearize", f"{command}: neither run nor among NOT_RUN"
        words = in_small(words)
        if tuple(words) in commands_run:
            continue
        commands_run.add(tuple(words))
        code = run(words)
        # a gate decides about the tiny model, not about the page
        allowed = (0, 3) if "--gate" in words or "--compare" in words or words[0] == "run" else (0,)
        assert code in allowed, f"{command}: exit code {code}\n{capsys.readouterr().err}"


def write_settings(text: str) -> None:
    """Write each YAML block that begins with its file's name into the workspace, with what makes it small."""
    for block in blocks_of(text, "yaml"):
        name = re.match(r"# ([\w-]+\.yaml)\n", block)
        if name:
            for word, replacement in WORDS.items():
                block = re.sub(rf"(?<=: ){re.escape(word)}(?=[\n,}}])", replacement, block)
            block = re.sub(
                r"\btokens: \d+", "tokens: 300, seq_len: 150, data: [corpus.jsonl]", with_small_lengths(block)
            )
            block = block.replace("suite: quick", SMALL_SUITE)
            Path(name.group(1)).write_text(block, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_in_python_runs(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for example in blocks_of(page.read_text(encoding="utf-8"), "python"):
        for word, replacement in PYTHON.items():
            example = example.replace(word, replacement)
        exec(compile(example, str(page), "exec"), {})


def test_each_exception_is_needed():
    commands = [command for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))]
    unused = [prefix for prefix in NOT_RUN if not any(command.startswith(prefix) for command in commands)]
    assert not unused
