"""Training: losses, data, exact resumption, equal loss over processes, and what is written."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import SETTINGS, convert_to_train, lora_recipe, quiet, train, train_command, write_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.checkpoint.student import Student
from linearize.data.packing import packed_rows
from linearize.errors import ConfigError
from linearize.modeling.loading import load_student
from linearize.settings.loading import load_config, load_recipe
from linearize.training.model import Distiller
from linearize.workflows.convert import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer_folder):
    """Convert a tiny model once for this file. Only to be read."""
    folder = tmp_path_factory.mktemp("converted")
    base = write_base(folder / "base", tokenizer_folder, tie_word_embeddings=True)
    return convert_to_train(base, folder / "converted")


@pytest.fixture
def own_conversion(base_folder, tmp_path):
    """Convert a tiny model for one test, which may change it."""
    return convert_to_train(base_folder(tie_word_embeddings=True), tmp_path / "converted")


@pytest.fixture(scope="module")
def trained(converted, tmp_path_factory):
    """Train once with the settings that other runs are compared with. Only to be read."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(converted, out)
    return out


@pytest.fixture(scope="module")
def tuned(converted, tmp_path_factory):
    """Train for fifty steps. Return (student, folder), only to be read."""
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    return train(converted, out, lora_recipe("tokens=4800")), out


def metrics_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_logged(tuned):
    metrics = metrics_of(tuned[1])
    assert [row["step"] for row in metrics] == list(range(1, 51))
    assert {"tokens", "loss", "lr", "tokens_per_second", "eta_seconds", "memory_bytes"} <= metrics[0].keys()


def test_the_time_that_is_left_follows_from_the_tokens_that_are(tuned):
    metrics = metrics_of(tuned[1])
    for row in metrics:
        remaining = metrics[-1]["tokens"] - row["tokens"]
        assert row["eta_seconds"] == pytest.approx(remaining / row["tokens_per_second"])


def test_training_lowers_the_loss(tuned):
    losses = [row["loss"] for row in metrics_of(tuned[1])]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_states_of_a_finished_run_are_removed(tuned):
    assert not tuned[1].with_name("tuned.training").exists()


def test_the_output_is_marked_as_finetuned(tuned):
    student, out = tuned
    assert json.loads((out / "linearize.json").read_bytes())["kind"] == "finetuned" == student.kind


def test_the_output_loads_like_a_conversion(tuned):
    _, info = AutoModelForCausalLM.from_pretrained(tuned[1], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_merged_weights_equal_the_parent_with_the_adapter(converted, tuned):
    adapted = PeftModel.from_pretrained(load_student(converted, dtype=torch.float32), tuned[1] / "adapter")
    merged, ids = load_student(tuned[1], dtype=torch.float32), torch.randint(300, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_training_changes_the_projections_and_the_added_parameters_alone(converted, tuned):
    before, after = (load_student(folder, dtype=torch.float32).state_dict() for folder in (converted, tuned[1]))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    kinds = {name.split("self_attn.")[-1].removesuffix(".weight") for name in changed}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "mixer.log_mass"}


def test_the_output_has_a_tokenizer_with_its_chat_template(tuned):
    assert AutoTokenizer.from_pretrained(tuned[1]).chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_training_in_bf16_leaves_untrained_digits_alone(base_folder, tmp_path, dtype):
    """The weights of a checkpoint with more digits are not rounded to what they were trained in."""
    converted = convert_to_train(base_folder(dtype=dtype, tie_word_embeddings=True), tmp_path / "converted")
    train(converted, tmp_path / "tuned", lora_recipe("precision=bf16", "lora.targets=['q_proj']"))
    before, after = (load_student(folder, dtype=torch.float32) for folder in (converted, tmp_path / "tuned"))
    changed = 0
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values()):
        if "q_proj" in name:
            changed += 1
            assert not torch.equal(old, new) and not torch.equal(new, new.bfloat16().float())
        elif ".mixer." not in name:
            assert torch.equal(old, new), name
    assert changed == 3


def test_no_merge_writes_the_adapter_and_loads(converted, trained, tmp_path):
    train(converted, tmp_path / "adapter", merge=False)
    assert not (tmp_path / "adapter" / "config.json").exists()
    ids = torch.randint(300, (1, 60))
    with torch.no_grad():
        a, b = (load_student(out, dtype=torch.float32)(ids).logits for out in (trained, tmp_path / "adapter"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_teacher_is_the_base_and_the_student_starts_as_converted(converted):
    """The first loss is the divergence of the untrained conversion from the base, computed here the long way."""
    from helpers import tiny_base

    from linearize.training.model import Distiller, add_adapters

    settings = lora_recipe()
    tokenizer = AutoTokenizer.from_pretrained(converted)
    batch = next(packed_rows(["sample"], tokenizer, seq_len=48, text_field="text", completion_only=False, seed=0))
    student = load_student(converted, dtype=torch.float32)
    distiller = Distiller(add_adapters(student, settings.lora))
    distiller.start(settings.resolved_stages()[0])
    got = distiller(batch, torch.tensor(float(distiller.counted(batch))))
    base = tiny_base(tie_word_embeddings=True)
    with torch.no_grad():
        plain = load_student(converted, dtype=torch.float32)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        student_log, base_log = (model(**inputs).logits.log_softmax(-1) for model in (plain, base))
    torch.testing.assert_close(got, (base_log.exp() * (base_log - student_log)).sum(-1).mean(), rtol=1e-4, atol=1e-6)


def test_two_processes_give_the_loss_of_one(converted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    single = subprocess.run(train_command(converted, tmp_path / "one"), env=environment, capture_output=True, text=True)
    assert single.returncode == 0, single.stderr[-2000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    double = subprocess.run(
        [*torchrun, *train_command(converted, tmp_path / "two")[1:]],
        env={**environment, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert double.returncode == 0, double.stderr[-3000:]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert json.loads((tmp_path / "two" / "linearize.json").read_bytes())["finetune"]["processes"] == 2
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)


def test_accumulation_and_checkpointing_change_nothing(converted, trained, tmp_path):
    train(converted, tmp_path / "split", lora_recipe("gradient_accumulation=2", "gradient_checkpointing=true"))
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (trained, tmp_path / "split"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=3e-5)


def test_where_memory_is_short_fewer_rows_at_once_come_to_the_same(converted, tmp_path, monkeypatch):
    rows = lora_recipe("batch_size=6", "tokens=1K")
    train(converted, tmp_path / "plain", rows)
    tried, forward = [], Distiller.forward

    def short_of_memory(self, batch, normaliser):
        tried.append(len(batch.input_ids))
        loss = forward(self, batch, normaliser)
        if tried[-1] > 2 or tried == [6, 3, 2]:  # the last after some of the step's gradients
            raise torch.OutOfMemoryError
        return loss

    monkeypatch.setattr(Distiller, "forward", short_of_memory)
    with pytest.warns(UserWarning, match="no memory for 6 rows at once, trying 3"):
        train(converted, tmp_path / "short", rows)
    assert tried[:4] == [6, 3, 2, 1] and set(tried[4:]) == {1}
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "short"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=3e-5)
    monkeypatch.setattr(Distiller, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        train(converted, tmp_path / "none", rows)


def test_liger_trains_on_instructions_by_cross_entropy(base_folder, tmp_path):
    out = tmp_path / "liger"
    convert(str(base_folder()), load_config("liger", {"window": 9}), out=out, verify=False, progress=quiet)
    data = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"Name the number {i}.", "input": "", "output": f"It is {i}, " * 6} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["seq_len=64", "batch_size=2", "tokens=2560", f"data=['{data}']"]
    result = train(out, tmp_path / "tuned", load_recipe("liger", {}, sets))
    assert result.manifest.finetune.last_loss < result.manifest.finetune.first_loss


def test_a_fixed_sum_has_nothing_to_train_but_lora(base_folder, tmp_path):
    """Without parameters of its own a student still trains, saves and loads."""
    out = tmp_path / "sum"
    convert(str(base_folder()), load_config(None, {"window": 9, "mix": "sum"}), out=out, verify=False, progress=quiet)
    train(out, tmp_path / "tuned")
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


@pytest.mark.parametrize("layers", ["0-2", "1"])
def test_layers_of_a_window_alone_train_their_lora(base_folder, tmp_path, layers):
    """Everywhere, and beside layers with a recurrent branch, which trains too; `transfer` passes them by."""
    settings = load_config(
        None, {"mixer": "gla", "window": 12, "sinks": 2}, [f"layers={{'{layers}': {{mixer: none}}}}"]
    )
    convert(str(base_folder()), settings, out=tmp_path / "c", verify=False, progress=quiet)
    sets = ["tokens=960"]
    if layers == "1":
        sets += ["stages=[{name: transfer, share: 0.5, seq_len: 48}, {name: distill, share: 0.5, seq_len: 48}]"]
    train(tmp_path / "c", tmp_path / "tuned", lora_recipe(*sets))
    before, tuned = (load_student(tmp_path / name, dtype=torch.float32) for name in ("c", "tuned"))
    first = before.state_dict()
    moved = {name: not torch.equal(value, first[name]) for name, value in tuned.state_dict().items()}
    branches = [moved[name] for name in moved if ".mixer." in name]
    assert branches == ([] if layers == "0-2" else [True] * 2) and any(moved.values())
    assert tuned(torch.randint(2, 300, (1, 40))).logits.isfinite().all()


def test_finetuning_a_finetuned_student_keeps_the_first_base_as_teacher(converted, tmp_path):
    train(converted, tmp_path / "once")
    result = train(tmp_path / "once", tmp_path / "twice")
    assert result.manifest.finetune.parent == str(tmp_path / "once")
    assert result.manifest.base == Student.read(converted).manifest.base


BAD_DATA = {
    "empty": ("data.jsonl", b"", "is empty"),
    "no field": ("data.jsonl", b'{"body": "x"}\n', "has the fields body; needed is 'text'"),
    "too short": ("data.txt", b"a few words", "fewer than one sequence of 48"),
    "unknown type": ("data.csv", b"a,b", "allowed file types are"),
    "not JSON": ("data.jsonl", b"{nonsense\n", "cannot be read"),
    "not parquet": ("data.parquet", b"nonsense", "cannot be read"),
}


def test_what_fails_before_training_leaves_nothing(converted, tmp_path, cli):
    sets = [part for item in SETTINGS for part in ("--set", item)]
    for flags in (["--teacher", tmp_path / "gone"], ["--set", "gradient_accumulation=3"]):
        code, _, err = cli("finetune", converted, "-o", tmp_path / "out", *sets, *flags)
        assert code == 2, err
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_an_adapter_alone_can_be_evaluated(converted, tmp_path, cli):
    train(converted, tmp_path / "out", merge=False)
    flags = ["--lengths", 64, "--max-tokens", 128, "--only", "perplexity"]
    code, out, err = cli("eval", tmp_path / "out", *flags, "--json")
    assert code == 0 and json.loads(out)["metrics"], err
    assert (tmp_path / "out" / "eval" / "results.json").is_file()


@pytest.mark.parametrize("case", list(BAD_DATA))
def test_bad_data(converted, tmp_path, cli, case):
    name, content, message = BAD_DATA[case]
    path = tmp_path / name
    path.write_bytes(content)
    sets = [part for item in SETTINGS for part in ("--set", item)]
    code, out, err = cli("finetune", converted, "-o", tmp_path / "out", "--data", path, *sets)
    assert code == 2 and message in err and out == "", err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seq-len", "12"], ["never leaves the window"]),
        (["--seq-len", "5000"], ["512 positions"]),
        (["--batch-size", "0"], ["batch_size", "got 0"]),
        (["--set", "lora.targets=[qproj]"], ["qproj", "did you mean 'q_proj'"]),
        (["--set", "batch_size=3", "--set", "gradient_accumulation=2"], ["do not divide"]),
        (["--recipe", "lorra"], ["lorra", "did you mean 'lora'"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--set", "loss.kind=mse"], ["loss.kind", "mse"]),
    ],
)
def test_bad_training_options(converted, tmp_path, cli, options, words):
    sets = [part for item in ("seq_len=48", "tokens=96") for part in ("--set", item)]
    sets = [] if "--seq-len" in options else sets
    code, _, err = cli("finetune", converted, "-o", tmp_path / "out", *sets, *options)
    assert code == 2, err
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_finetune_needs_a_linearized_model(base_folder, cli):
    code, _, err = cli("finetune", base_folder())
    assert code == 2 and "linearize convert" in err
    code, _, err = cli("finetune")
    assert code == 2 and "none given" in err


def test_an_adapter_belongs_to_its_parent(own_conversion, tmp_path, cli):
    train(own_conversion, tmp_path / "adapter", merge=False)
    flags = ["--only", "perplexity", "--lengths", "32", "--max-tokens", "64"]
    code, _, err = cli("eval", tmp_path / "adapter", *flags)
    assert code == 0, err
    weights = own_conversion / "model-00001-of-00002.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    code, _, err = cli("eval", tmp_path / "adapter", *flags)
    assert code == 2 and "has changed since" in err and str(own_conversion) in err
    own_conversion.rename(tmp_path / "elsewhere")
    code, _, err = cli("eval", tmp_path / "adapter", *flags)
    assert code == 2 and "is gone" in err and str(own_conversion) in err


def test_every_dataset_is_there_before_anything_is_trained(converted, tmp_path, cli):
    data = ["--data", "sample", "--data", "typo.parquet"]
    code, out, err = cli("finetune", converted, *data, "--seq-len", "48", "-o", tmp_path / "tuned")
    assert (code, out) == (2, "") and "no file 'typo.parquet'" in err and not list(tmp_path.glob("tuned*"))


def test_a_student_is_not_written_over_itself(converted, cli):
    before = sorted(path.name for path in converted.iterdir())
    code, _, err = cli("finetune", converted, "-o", converted, "--seq-len", "48", "--overwrite", "--no-merge")
    assert code == 2 and "is to be trained" in err and sorted(path.name for path in converted.iterdir()) == before


def test_losses_of_the_last_stage_are_those_that_are_told(converted, tmp_path):
    stages = "stages=[{name: transfer, share: 0.5}, {name: distill, share: 0.5}]"
    result = train(converted, tmp_path / "tuned", lora_recipe(stages))
    steps = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["stage"] == "distill"]
    assert result.manifest.finetune.first_loss == losses[0] and len(losses) < len(steps)
    assert result.manifest.finetune.last_loss == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))


def test_adapters_with_a_start_of_their_own_are_taught_by_the_recorded_base(base_folder, tmp_path):
    base = base_folder()
    out = convert_to_train(base, tmp_path / "converted")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()  # which the conversion links to
    save_file(
        {name: 1.1 * value for name, value in weights.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ConfigError, match="has changed since the conversion"):
        train(out, tmp_path / "tuned", lora_recipe("lora.variant=pissa"))
