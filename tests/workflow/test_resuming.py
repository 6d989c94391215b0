"""Runs that were stopped go on to the same bytes, and are not taken for other runs."""

import json
import os
import signal
import subprocess
import time

import pytest
from helpers import convert_to_train, lora_recipe, quiet, train, train_command, weights_of
from safetensors.torch import load_file, save_file

from linearize.checkpoint.work_folder import alone_in, claim
from linearize.errors import ConfigError, ResourceError


@pytest.fixture
def converted(base_folder, tmp_path):
    return convert_to_train(base_folder(tie_word_embeddings=True), tmp_path / "converted")


def test_a_killed_run_resumes_to_the_same_bytes(converted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(train_command(converted, whole), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(train_command(converted, broken), env=environment, stderr=subprocess.DEVNULL)
    work = tmp_path / "broken.training"
    deadline = time.monotonic() + 120
    while len(list(work.glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not broken.exists() and list(work.glob("step-*"))
    again = subprocess.run(
        train_command(converted, broken), env=environment, check=True, capture_output=True, text=True
    )
    assert "resuming" in again.stderr
    assert weights_of(whole) == weights_of(broken)
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_ctrl_c_saves_and_resumes(converted, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(train_command(converted, out, "tokens=96000"), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out.training" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err, err
    saved = sorted((tmp_path / "out.training").glob("step-*"))
    assert json.loads((saved[-1] / "state.json").read_bytes())["step"] == len(metrics.read_text().splitlines())
    assert not out.exists()
    assert not list((tmp_path / "out.training").rglob("*.pt")) + list((tmp_path / "out.training").rglob("*.bin"))


def test_resuming_with_other_settings_names_the_field(converted, tmp_path, monkeypatch):
    import linearize.training.loop as loop

    out = tmp_path / "out"
    real = loop.StageTrainer._update
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("power cut")
        return real(*arguments)

    monkeypatch.setattr(loop.StageTrainer, "_update", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        train(converted, out)
    monkeypatch.setattr(loop.StageTrainer, "_update", real)
    with pytest.raises(ConfigError, match=r"recipe\.optimizer\.lr: was 0\.01, is 0\.02"):
        train(converted, out, lora_recipe("optimizer.lr=0.02"))
    data = tmp_path / "mine.txt"
    data.write_text("a text of my own, of no great length. " * 100)
    with pytest.raises(ConfigError, match=r"data: was .*recipe\.data: was \['sample'\]"):
        train(converted, out, lora_recipe(f"data=['{data}']"))
    assert train(converted, out, lora_recipe("optimizer.lr=0.02"), restart=True).manifest.finetune.steps == 10


def test_a_run_without_a_state_starts_afresh(converted, tmp_path):
    """The log of a run that died before its first state is not taken for this run's."""
    work = tmp_path / "out.training"
    claim(work)
    (work / "metrics.jsonl").write_text('{"step": 1, "loss": 77.0, "lr": Infinity}\n')
    result = train(converted, tmp_path / "out")
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and result.manifest.finetune.first_loss < 77


def test_two_processes_do_not_train_one_output(converted, tmp_path, cli):
    work = tmp_path / "out.training"
    claim(work)
    with alone_in(work, tmp_path / "out"):
        code, _, err = cli(
            "finetune", converted, "-o", tmp_path / "out", "--restart", "--recipe", "ci", "--seq-len", 64
        )
    assert code == 2 and "another process is writing" in err and work.exists()


def test_who_is_refused_clears_nothing_away(converted, tmp_path, cli, monkeypatch):
    """A second process that looked before the first had begun."""
    work = tmp_path / "out.training"
    monkeypatch.setattr("linearize.workflows.finetune.check_free", quiet)
    claim(work)
    (work / "metrics.jsonl").write_text("the first one's\n")
    with alone_in(work, tmp_path / "out"):
        code, _, err = cli("finetune", converted, "-o", tmp_path / "out", "--recipe", "ci", "--seq-len", 64)
    assert code == 2 and "another process is writing" in err and (work / "metrics.jsonl").exists()


def test_what_was_trained_is_written_after_all(converted, tmp_path, monkeypatch):
    """A run that ends between its last state and its output is resumed to the same bytes."""
    train(converted, tmp_path / "whole")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("linearize.training.output.write_merged", full)
        with pytest.raises(ResourceError):
            train(converted, tmp_path / "stopped")
    resumed = train(converted, tmp_path / "stopped")
    assert resumed.manifest.finetune.tokens == 960 and resumed.manifest.finetune.tokens_in_these_seconds == 0
    for name in ("model-00001-of-00002.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert name.startswith("adapter") or (converted / name).read_bytes() != (tmp_path / "whole" / name).read_bytes()


def test_another_student_in_the_same_place_is_not_trained_on(base_folder, converted, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "tuned"
    with monkeypatch.context() as patch:
        patch.setattr("linearize.training.output.write_merged", stop)
        with pytest.raises(KeyboardInterrupt):
            train(converted, out)
    tensors = load_file(converted / "model-00002-of-00002.safetensors")
    name = next(iter(tensors))
    tensors[name] += 0.5
    save_file(tensors, converted / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="student: was"):
        train(converted, out)
