"""Tiny random Llamas for breadth, SmolLM2-135M for truth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, VOCABULARY, copy_conversion, quiet, write_base

# beside other workers one thread each; small models gain nothing from more. What a test starts inherits it.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else max(1, min(2, os.cpu_count() or 1))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def results_of_this_session_alone(tmp_path_factory):
    """Keep the results that other runs of the tests, and of the tool, have cached out of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_addoption(parser):
    parser.addoption("--record-pins", action="store_true", help="record the pinned numbers of test_pins.py anew")


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that no worker is left alone with one."""
    slowest = ("test_real_model.py", "test_versions.py", "test_report.py")
    items.sort(key=lambda item: slowest.index(item.path.name) if item.path.name in slowest else len(slowest))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Train a small byte-level BPE with a chat template on the sample text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from linearize.data.samples import SAMPLES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = SAMPLES["sample-eval"].read_text(encoding="utf-8").splitlines()[:8]
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def base_folder(tmp_path, tokenizer_folder):
    """Make a complete base checkpoint folder: make(shape, name, dtype=..., shards=..., **config)."""

    def make(shape: str = "gqa", name: str = "base", **options) -> Path:
        return write_base(tmp_path / name, tokenizer_folder, shape, **options)

    return make


@pytest.fixture(scope="session")
def smollm2():
    """Return the real base model, a .gguf file or a folder. Skip where scripts/get_model.py cannot fetch it."""
    named = os.environ.get("LINEARIZE_TEST_MODEL")
    if named:
        return named
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "get_model.py")], capture_output=True, text=True, cwd=ROOT
    )
    if run.returncode != 0:
        pytest.skip(f"the real model cannot be had: {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout.strip()


@pytest.fixture
def in_float32(monkeypatch):
    """Compute in float32 where bfloat16 would be the choice, for figures that have to agree to more digits."""
    monkeypatch.setattr("linearize.device.bf16_is_fast", lambda: False)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Run the command line in this process, in an empty folder: cli("convert", ...) -> (code, stdout, stderr)."""
    from linearize.cli.app import run

    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def one_conversion(tmp_path_factory, tokenizer_folder):
    """Convert a tiny model once: window 12, two sinks, a recurrent branch that is not silent. Only to be read."""
    from linearize.settings.loading import load_config
    from linearize.workflows.convert import convert

    folder = tmp_path_factory.mktemp("one-conversion")
    base, out = write_base(folder / "base", tokenizer_folder), folder / "linearized" / "tiny"
    settings = load_config(None, {"window": 12, "sinks": 2}, ["mix_options.log_mass=0.0"])
    convert(str(base), settings, out=out, verify=False, progress=quiet)
    return out


@pytest.fixture
def converted(one_conversion, tmp_path):
    """Copy `one_conversion` and its base for one test: tmp_path/base and tmp_path/linearized/tiny."""
    return copy_conversion(one_conversion, tmp_path)


@pytest.fixture(autouse=True)
def verification_here(request, monkeypatch):
    """Verify conversions in this process, for a fresh one takes seconds to import what is here already."""
    converts = {"base_folder", "cli"} & set(request.fixturenames)
    if not converts or "verifies_apart" in request.keywords:
        return

    def run_verification(folder, base):
        from linearize.conversion.verify import VerificationFailure, verify
        from linearize.errors import CheckpointError

        try:
            return json.loads(json.dumps(verify(folder, base)))
        except VerificationFailure as failure:
            raise CheckpointError(f"verification failed: {failure}") from None

    monkeypatch.setattr("linearize.workflows.convert.run_verification", run_verification)
