"""Training: losses, data, exact resumption, equal loss over processes, and what is written."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import SETTINGS, quiet, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.checkpoint.student import Student
from linearize.checkpoint.writing import alone_in
from linearize.data.documents import data_fingerprint, read_documents
from linearize.data.packing import IGNORED, Batch, packed_rows, read_ahead, with_copies
from linearize.errors import ConfigError, ResourceError
from linearize.modeling.loading import load_student
from linearize.modeling.readout import Readout
from linearize.settings.loading import load_config, load_recipe
from linearize.settings.recipe import Recipe
from linearize.training.losses import chunked_cross_entropy, chunked_kl
from linearize.training.model import Distiller
from linearize.workflows.convert import convert
from linearize.workflows.finetune import finetune


def recipe(*sets: str) -> Recipe:
    return load_recipe("lora", {}, [*SETTINGS, *sets])


def conversion(base, out):
    settings = load_config(
        None, {"mixer": "gla", "window": 12, "sinks": 2, "keep_softmax": "1:0"}, ["mix_options.log_mass=-1"]
    )
    convert(str(base), settings, out=out, verify=False, progress=quiet)
    return out


@pytest.fixture
def converted(base_folder, tmp_path):
    return conversion(base_folder(tie_word_embeddings=True), tmp_path / "converted")


def run(converted, out, settings=None, **options):
    return finetune(
        converted, settings or recipe(), recipe_name="lora", out=out, progress=quiet, report=quiet, **options
    )


def command(converted, out, *sets) -> list[str]:
    flags = [part for item in (*SETTINGS, *sets) for part in ("--set", item)]
    return [sys.executable, "-m", "linearize", "finetune", str(converted), "-o", str(out), *flags]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, 2.0)])
def test_chunked_losses_equal_the_whole_and_reach_every_position(kind, chunk, scale, softcap):
    torch.manual_seed(0)
    hidden, teacher = torch.randn(29, 6, requires_grad=True), torch.randn(29, 5)
    head, teacher_head = torch.randn(11, 6, requires_grad=True), torch.randn(11, 5)
    bias = torch.randn(11, requires_grad=True)
    weights, targets = torch.rand(29) + 0.1, torch.randint(11, (29,))
    logits = scale * (hidden @ head.T + bias)
    log = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
    readout = Readout(head, bias, scale, softcap)
    if kind == "kl":
        reference = (teacher @ teacher_head.T).log_softmax(-1)
        wanted = (weights[:, None] * reference.exp() * (reference - log)).sum()
        got = chunked_kl(hidden, teacher, readout, Readout(teacher_head), weights, chunk)
    else:
        wanted = -(weights * log.gather(-1, targets[:, None])[:, 0]).sum()
        got = chunked_cross_entropy(hidden, readout, targets, weights, chunk)
    torch.testing.assert_close(got, wanted)
    wanted_gradients = torch.autograd.grad(3 * wanted, (hidden, head, bias))
    gradients = torch.autograd.grad(3 * got, (hidden, head, bias))
    for a, b in zip(gradients, wanted_gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (gradients[0].abs().sum(-1) > 0).all()


def test_an_uncounted_position_gets_no_gradient():
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    chunked_cross_entropy(hidden, Readout(head), torch.tensor([1, IGNORED, 2, IGNORED]), weights, 2).backward()
    assert (hidden.grad.abs().sum(-1) > 0).tolist() == [True, False, True, False]


def test_finetuning_improves_and_writes_a_complete_checkpoint(converted, tmp_path):
    out = tmp_path / "tuned"
    result = run(converted, out, recipe("tokens=4800"))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 51))
    assert {"tokens", "loss", "lr", "tokens_per_second", "eta_seconds", "memory_bytes"} <= metrics[0].keys()
    for row in metrics:
        left = metrics[-1]["tokens"] - row["tokens"]
        assert row["eta_seconds"] == pytest.approx(left / row["tokens_per_second"])
    mean = lambda rows: sum(m["loss"] for m in rows) / len(rows)  # noqa: E731
    assert mean(metrics[-10:]) < 0.8 * mean(metrics[:10])
    assert not (tmp_path / "tuned.training").exists()
    assert json.loads((out / "linearize.json").read_bytes())["kind"] == "finetuned" == result.kind
    # loads like a converted one, and equals the parent with the adapter
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_student(converted, dtype=torch.float32), out / "adapter")
    ids = torch.randint(300, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    before = load_student(converted, dtype=torch.float32).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    kinds = {name.split("self_attn.")[-1].removesuffix(".weight") for name in changed}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "mixer.log_mass"}
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_training_in_bf16_leaves_untrained_digits_alone(base_folder, tmp_path, dtype):
    """The weights of a checkpoint with more digits are not rounded to what they were trained in."""
    converted = conversion(base_folder(dtype=dtype, tie_word_embeddings=True), tmp_path / "converted")
    run(converted, tmp_path / "tuned", recipe("precision=bf16", "lora.targets=['q_proj']"))
    before, after = (load_student(folder, dtype=torch.float32) for folder in (converted, tmp_path / "tuned"))
    changed = 0
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values()):
        if "q_proj" in name:
            changed += 1
            assert not torch.equal(old, new) and not torch.equal(new, new.bfloat16().float())
        elif ".mixer." not in name:
            assert torch.equal(old, new), name
    assert changed == 3


def test_no_merge_writes_the_adapter_and_loads(converted, tmp_path):
    run(converted, tmp_path / "merged")
    run(converted, tmp_path / "adapter", merge=False)
    assert not (tmp_path / "adapter" / "config.json").exists()
    ids = torch.randint(300, (1, 60))
    with torch.no_grad():
        a, b = (load_student(tmp_path / name, dtype=torch.float32)(ids).logits for name in ("merged", "adapter"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_teacher_is_the_base_and_the_student_starts_as_converted(converted):
    """The first loss is the divergence of the untrained conversion from the base, computed here the long way."""
    from helpers import tiny_base

    from linearize.training.model import Distiller, add_adapters

    settings = recipe()
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


def test_copying_rows_repeat_a_span_from_outside_the_window():
    plain = [
        Batch(torch.arange(i, i + 64)[None], torch.arange(64)[None], torch.full((1, 64), IGNORED)) for i in range(200)
    ]
    rows = list(with_copies(iter(plain), 0.5, shortest=24, seed=1))
    again = list(with_copies(iter(plain), 0.5, shortest=24, seed=1))
    copied = [(row, was) for row, was in zip(rows, plain) if row is not was]
    assert 70 < len(copied) < 130
    distances = set()
    for row, was in copied:
        first = (row.input_ids[0, :44] == row.input_ids[0, 44]).nonzero()[-1].item()
        assert torch.equal(row.input_ids[0, 44:], row.input_ids[0, first : first + 20])
        assert torch.equal(row.input_ids[0, :44], was.input_ids[0, :44])
        assert torch.equal(row.labels[0, 43:-1], row.input_ids[0, 44:]) and row.labels[0, -1] == IGNORED
        distances.add(44 - first)
    assert min(distances) == 24 and max(distances) == 44
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rows, again))
    assert list(with_copies(iter(plain), 0.0, shortest=24, seed=1)) == plain
    assert list(with_copies(iter(plain), 1.0, shortest=63, seed=1)) == plain  # no room to copy


def test_a_killed_run_resumes_to_the_same_bytes(converted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(converted, whole), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command(converted, broken), env=environment, stderr=subprocess.DEVNULL)
    work = tmp_path / "broken.training"
    deadline = time.monotonic() + 120
    while len(list(work.glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not broken.exists() and list(work.glob("step-*"))
    again = subprocess.run(command(converted, broken), env=environment, check=True, capture_output=True, text=True)
    assert "resuming" in again.stderr
    assert weights_of(whole) == weights_of(broken)
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_ctrl_c_saves_and_resumes(converted, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(converted, out, "tokens=96000"), stderr=subprocess.PIPE, text=True)
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
        run(converted, out)
    monkeypatch.setattr(loop.StageTrainer, "_update", real)
    with pytest.raises(ConfigError, match=r"recipe\.optimizer\.lr: was 0\.01, is 0\.02"):
        run(converted, out, recipe("optimizer.lr=0.02"))
    data = tmp_path / "mine.txt"
    data.write_text("a text of my own, of no great length. " * 100)
    with pytest.raises(ConfigError, match=r"data: was .*recipe\.data: was \['sample'\]"):
        run(converted, out, recipe(f"data=['{data}']"))
    assert run(converted, out, recipe("optimizer.lr=0.02"), restart=True).manifest.finetune.steps == 10


def test_two_processes_give_the_loss_of_one(converted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    single = subprocess.run(command(converted, tmp_path / "one"), env=environment, capture_output=True, text=True)
    assert single.returncode == 0, single.stderr[-2000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    double = subprocess.run(
        [*torchrun, *command(converted, tmp_path / "two")[1:]],
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


def test_accumulation_and_checkpointing_change_nothing(converted, tmp_path):
    run(converted, tmp_path / "plain")
    run(converted, tmp_path / "split", recipe("gradient_accumulation=2", "gradient_checkpointing=true"))
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "split"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=3e-5)


def test_where_memory_is_short_fewer_rows_at_once_come_to_the_same(converted, tmp_path, monkeypatch):
    rows = recipe("batch_size=6", "tokens=1K")
    run(converted, tmp_path / "plain", rows)
    tried, forward = [], Distiller.forward

    def short_of_memory(self, batch, normaliser):
        tried.append(len(batch.input_ids))
        loss = forward(self, batch, normaliser)
        if tried[-1] > 2 or tried == [6, 3, 2]:  # the last after some of the step's gradients
            raise torch.OutOfMemoryError
        return loss

    monkeypatch.setattr(Distiller, "forward", short_of_memory)
    with pytest.warns(UserWarning, match="no memory for 6 rows at once, trying 3"):
        run(converted, tmp_path / "short", rows)
    assert tried[:4] == [6, 3, 2, 1] and set(tried[4:]) == {1}
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "short"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=3e-5)
    monkeypatch.setattr(Distiller, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        run(converted, tmp_path / "none", rows)


def test_liger_recipe_reproduces_the_published_settings():
    liger = load_recipe("liger")
    assert (liger.lora.rank, liger.lora.alpha, liger.lora.targets) == (8, 8, ["q_proj", "k_proj", "v_proj"])
    assert (liger.optimizer.lr, liger.optimizer.warmup_fraction, liger.optimizer.schedule) == (1e-3, 0, "constant")
    assert (liger.batch_size, liger.seq_len, liger.tokens) == (8, 1024, 20_000_000)
    assert liger.loss.kind == "ce" and liger.loss.completion_only
    config = load_config("liger")
    assert (config.window, config.sinks, config.mix) == (65, 0, "sum")


def test_liger_trains_on_instructions_by_cross_entropy(base_folder, tmp_path):
    out = tmp_path / "liger"
    convert(str(base_folder()), load_config("liger", {"window": 9}), out=out, verify=False, progress=quiet)
    data = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"Name the number {i}.", "input": "", "output": f"It is {i}, " * 6} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["seq_len=64", "batch_size=2", "tokens=2560", f"data=['{data}']"]
    result = run(out, tmp_path / "tuned", load_recipe("liger", {}, sets))
    assert result.manifest.finetune.last_loss < result.manifest.finetune.first_loss


def test_a_fixed_sum_has_nothing_to_train_but_lora(base_folder, tmp_path):
    """Without parameters of its own a student still trains, saves and loads."""
    out = tmp_path / "sum"
    convert(str(base_folder()), load_config(None, {"window": 9, "mix": "sum"}), out=out, verify=False, progress=quiet)
    run(out, tmp_path / "tuned")
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
    run(tmp_path / "c", tmp_path / "tuned", recipe(*sets))
    before, tuned = (load_student(tmp_path / name, dtype=torch.float32) for name in ("c", "tuned"))
    first = before.state_dict()
    moved = {name: not torch.equal(value, first[name]) for name, value in tuned.state_dict().items()}
    branches = [moved[name] for name in moved if ".mixer." in name]
    assert branches == ([] if layers == "0-2" else [True] * 2) and any(moved.values())
    assert tuned(torch.randint(2, 300, (1, 40))).logits.isfinite().all()


def test_finetuning_a_finetuned_student_keeps_the_first_base_as_teacher(converted, tmp_path):
    run(converted, tmp_path / "once")
    result = run(tmp_path / "once", tmp_path / "twice")
    assert result.manifest.finetune.parent == str(tmp_path / "once")
    assert result.manifest.base == Student.read(converted).manifest.base


DATA_ROWS = {
    "text": {"text": "one two three"},
    "instruction": {"instruction": "Add.", "input": "2 2", "output": "four"},
    "messages": {"messages": [{"role": "user", "content": "Add 2 2."}, {"role": "assistant", "content": "four"}]},
}


@pytest.mark.parametrize("kind", list(DATA_ROWS))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_data_formats(tmp_path, tokenizer_folder, kind, suffix):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / f"data{suffix}"
    rows = [DATA_ROWS[kind]] * 3
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import gzip

        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    found = list(read_documents(str(path), tokenizer, text_field="text", completion_only=True, seed=None))
    assert len(found) == 3
    ids, counted = found[0]
    answer = tokenizer.decode([i for i, c in zip(ids, counted) if c])
    assert answer == ("one two three</s>" if kind == "text" else "four</s>")


def test_rows_that_say_nothing_are_passed_over(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path, user = tmp_path / "rows.jsonl", {"role": "user", "content": "Add 2 2."}
    answer = {"role": "assistant", "content": "four"}

    def answers() -> list[str]:
        found = read_documents(str(path), tokenizer, text_field="text", completion_only=True, seed=None)
        return [tokenizer.decode([i for i, c in zip(ids, counted) if c]) for ids, counted in found]

    conversations = [[], [user, answer], [answer], [user, answer, user, answer, user]]
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
        first, alone, last = answers()
        assert first == last == "four</s>" and alone.endswith("four</s>")
    path.write_text('{"text": null, "url": "a"}\n{"text": "one", "url": "b", "messages": []}\n')
    assert answers() == ["one</s>"]


def test_the_end_that_a_tokenizer_puts_behind_a_prompt_is_taken_off(tmp_path, tokenizer_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(DATA_ROWS["instruction"]) + "\n")
    ((ids, counted),) = read_documents(str(path), tokenizer, text_field="text", completion_only=True, seed=None)
    assert tokenizer.decode([i for i, c in zip(ids, counted) if c]) == "four</s>"


def test_a_long_text_is_read_in_pieces_and_names_are_taken_as_they_are(tmp_path, tokenizer_folder, monkeypatch):
    from linearize.data import documents as data

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "a[1]*.txt"
    lines = [f"line {i} of some words\n" for i in range(40)]
    path.write_text("".join(lines))
    options = {"text_field": "text", "completion_only": False, "seed": None}
    ((whole, _),) = read_documents(str(path), tokenizer, **options)
    monkeypatch.setattr(data, "LONGEST_TEXT", 200)
    pieces = [
        tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in read_documents(str(path), tokenizer, **options)
    ]
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True) == "".join(lines)
    assert len(pieces) == 4 and all(piece.endswith("\n") for piece in pieces)
    assert len(list(read_documents(str(path), tokenizer, **{**options, "seed": 1}))) == 4


def test_short_documents_are_left_out(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["short", "long " * 100, "brief"] * 3))
    options = {"seq_len": 64, "text_field": "text", "completion_only": False, "seed": 0}
    short = tokenizer("short").input_ids
    for row in itertools.islice(packed_rows([str(path)], tokenizer, shortest_document=50, **options), 12):
        starts = (row.position_ids[0] == 0).nonzero().flatten().tolist()
        assert all(row.input_ids[0, at : at + len(short)].tolist() != short for at in starts)
    with pytest.raises(ConfigError, match="hold 0 tokens in documents of at least 9999, fewer than one sequence of 64"):
        next(packed_rows([str(path)], tokenizer, shortest_document=9999, **options))


def test_packing_respects_documents(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 60)))
    rows = packed_rows([str(path)], tokenizer, seq_len=32, text_field="text", completion_only=False, seed=3)
    for _ in range(60):  # more than one pass over the data
        row = next(rows)
        ids, positions, labels = row.input_ids[0], row.position_ids[0], row.labels[0]
        assert ids.shape == positions.shape == labels.shape == (32,) and positions[0] == 0
        for t in range(31):
            continues = positions[t + 1] == positions[t] + 1
            assert continues or positions[t + 1] == 0
            assert labels[t] == (ids[t + 1] if continues else IGNORED)
        assert labels[31] == IGNORED


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


def test_a_run_without_a_state_starts_afresh(converted, tmp_path):
    """What a run that died before its first state had logged is not taken for this one's."""
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "metrics.jsonl").write_text('{"step": 1, "loss": 77.0, "lr": Infinity}\n')
    result = run(converted, tmp_path / "out")
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and result.manifest.finetune.first_loss < 77


def test_two_processes_do_not_train_one_output(converted, tmp_path, cli):
    work = tmp_path / "out.training"
    work.mkdir()
    with alone_in(work, tmp_path / "out"):
        code, _, err = cli(
            "finetune", converted, "-o", tmp_path / "out", "--restart", "--recipe", "ci", "--seq-len", 64
        )
    assert code == 2 and "another process is writing" in err and work.exists()


def test_who_is_refused_clears_nothing_away(converted, tmp_path, cli, monkeypatch):
    """A second process that looked before the first had begun."""
    work = tmp_path / "out.training"
    monkeypatch.setattr("linearize.workflows.finetune.check_free", quiet)
    work.mkdir()
    (work / "metrics.jsonl").write_text("the first one's\n")
    with alone_in(work, tmp_path / "out"):
        code, _, err = cli("finetune", converted, "-o", tmp_path / "out", "--recipe", "ci", "--seq-len", 64)
    assert code == 2 and "another process is writing" in err and (work / "metrics.jsonl").exists()


def test_the_fingerprint_of_data_is_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows").mkdir()
    for name, path in (("~/text.txt", "text.txt"), (str(tmp_path / "rows"), "rows/a.parquet")):
        (tmp_path / path).write_bytes(b"one")
        before = data_fingerprint([name])
        (tmp_path / path).write_bytes(b"two")
        assert data_fingerprint([name]) != before
    assert data_fingerprint(["owner/name"]) == data_fingerprint(["owner/name"])


def test_an_adapter_alone_can_be_evaluated(converted, tmp_path, cli):
    run(converted, tmp_path / "out", merge=False)
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


def test_rows_read_ahead_are_the_same_rows():
    made = []

    def rows():
        for i in range(20):
            made.append(i)
            yield i

    ahead = read_ahead(rows(), 5)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert len(made) <= 3 + 5
    assert list(ahead) == list(range(3, 20))


def test_what_fails_while_reading_ahead_is_raised_in_its_place():
    def rows():
        yield 0
        raise ConfigError("--data: damaged")

    ahead = read_ahead(rows(), 5)
    assert next(ahead) == 0
    with pytest.raises(ConfigError, match="damaged"):
        next(ahead)


def test_what_was_trained_is_written_after_all(converted, tmp_path, monkeypatch):
    """A run that ends between its last state and its output, for want of room or by a kill, is resumed to the same bytes."""
    run(converted, tmp_path / "whole")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("linearize.training.output.write_merged", full)
        with pytest.raises(ResourceError):
            run(converted, tmp_path / "stopped")
    resumed = run(converted, tmp_path / "stopped")
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
            run(converted, out)
    tensors = load_file(converted / "model-00002-of-00002.safetensors")
    name = next(iter(tensors))
    tensors[name] += 0.5
    save_file(tensors, converted / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="student: was"):
        run(converted, out)


def test_an_adapter_belongs_to_its_parent(converted, tmp_path, cli):
    run(converted, tmp_path / "adapter", merge=False)
    flags = ["--only", "perplexity", "--lengths", "32", "--max-tokens", "64"]
    code, _, err = cli("eval", tmp_path / "adapter", *flags)
    assert code == 0, err
    weights = converted / "model-00001-of-00002.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    code, _, err = cli("eval", tmp_path / "adapter", *flags)
    assert code == 2 and "has changed since" in err and str(converted) in err
    converted.rename(tmp_path / "elsewhere")
    code, _, err = cli("eval", tmp_path / "adapter", *flags)
    assert code == 2 and "is gone" in err and str(converted) in err


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
    result = run(converted, tmp_path / "tuned", recipe(stages))
    steps = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["stage"] == "distill"]
    assert result.manifest.finetune.first_loss == losses[0] and len(losses) < len(steps)
    assert result.manifest.finetune.last_loss == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))


def test_stages_given_with_other_keys_keep_their_own():
    stages = [{"name": "distill", "share": 0.5, "seq_len": 128}, {"name": "distill", "share": 0.5, "seq_len": 512}]
    for flags in ({"stages": stages, "seq_len": 256}, {"seq_len": 256, "stages": stages}):
        assert [stage.seq_len for stage in load_recipe("lora", flags).resolved_stages()] == [128, 512]


def test_adapters_with_a_start_of_their_own_are_taught_by_the_recorded_base(base_folder, tmp_path):
    base = base_folder()
    out = conversion(base, tmp_path / "converted")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()  # which the conversion links to
    save_file(
        {name: 1.1 * value for name, value in weights.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ConfigError, match="has changed since the conversion"):
        run(out, tmp_path / "tuned", recipe("lora.variant=pissa"))
