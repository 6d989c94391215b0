"""Evaluation: figures against plain computations, gates, verdict and exit code from one object."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import FLAGS, SUITE, quiet, tiny_base
from safetensors.torch import save_file
from transformers import AutoTokenizer

from linearize.data.recall_rows import recall_task
from linearize.errors import ConfigError, LinearizeError
from linearize.evaluation.passkey import DEPTHS, passkey_task
from linearize.evaluation.perplexity import position_buckets, windows_of
from linearize.evaluation.recall import accuracy
from linearize.evaluation.suite import Suite
from linearize.evaluation.text import text_ids_of
from linearize.modeling.readout import Readout
from linearize.report.gates import evaluate_gates, parse_gate, recovery_gates, regression_gates
from linearize.report.markdown import render_markdown, summary_table
from linearize.report.plots import plots_of, svg
from linearize.report.results import BASE, SCHEMA_VERSION, STUDENT, WINDOW, Findings, make_metric, mean_and_error
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert
from linearize.workflows.evaluate import evaluate


def test_figures_equal_a_plain_computation(converted, in_float32):
    results = evaluate(converted, SUITE, progress=quiet)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    from linearize.data.samples import SAMPLES

    ids = []
    for line in SAMPLES["sample-eval"].read_text().splitlines()[:3]:
        ids += [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
    windows = torch.tensor(ids[:256]).view(-1, 64)
    from linearize.modeling.loading import load_student

    student, base = load_student(converted, dtype=torch.float32), tiny_base()
    with torch.no_grad():
        logs = {
            name: model(windows).logits[:, :-1].log_softmax(-1)
            for name, model in (("student", student), ("base", base))
        }
    targets = windows[:, 1:, None]
    for name, log in logs.items():
        value = results.metric("perplexity@64").values[name]
        assert value.n == 4
        assert math.isclose(value.mean, (-log.gather(-1, targets)).mean().exp().item(), rel_tol=1e-5)
        nats = -log.gather(-1, targets).sum().item()
        texts = [tokenizer.decode(window[1:], skip_special_tokens=True) for window in windows]
        for kind, units in (("word", len(" | ".join(texts).split()) - 3), ("byte", len("".join(texts).encode()))):
            found = results.metric(f"{kind}_perplexity@64").values[name].mean
            assert math.isclose(found, math.exp(nats / units), rel_tol=1e-4), kind
        bits = results.metric("bits_per_byte@64").values[name].mean
        assert math.isclose(2**bits, results.metric("byte_perplexity@64").values[name].mean, rel_tol=1e-9)
    kl = (logs["base"].exp() * (logs["base"] - logs["student"])).sum(-1).mean().item()
    assert math.isclose(results.metric("kl@64").values["student"].mean, kl, rel_tol=1e-4)
    same = (logs["base"].argmax(-1) == logs["student"].argmax(-1)).float().mean().item()
    assert math.isclose(results.metric("agreement@64").values["student"].mean, same, rel_tol=1e-6)
    # an untrained conversion is its own student
    metric = results.metric("perplexity@64")
    assert metric.values["student"] == metric.values["untrained"]
    assert metric.values["window"] == metric.values["branch_off"] != metric.values["student"]
    rows = results.positions["perplexity@64"]
    weights = [row["end"] - row["start"] for row in rows]
    mean = sum(math.log(row["student"]) * w for row, w in zip(rows, weights)) / sum(weights)
    assert math.isclose(math.exp(mean), metric.values["student"].mean, rel_tol=1e-5)


def test_recall_rows_and_their_scoring():
    for distance in (5, 256, 700):
        task = recall_task(distance, 2, 1000, 7, seed=1)
        copied = task.ids[:, -task.counted :]
        assert torch.equal(copied, task.ids[:, -task.counted - distance : -distance])
        assert torch.equal(task.ids, recall_task(distance, 2, 1000, 7, seed=1).ids)
        assert (task.ids[:, 0] == 7).all()
        row, head = task.ids[0], Readout(torch.eye(1000))
        perfect = torch.cat([torch.eye(1000)[row[1:]], torch.zeros(1, 1000)])
        assert accuracy(perfect, head, row, task.counted) == 1.0
        assert accuracy(perfect.roll(1, 0), head, row, task.counted) < 0.1


def test_windows_and_buckets():
    assert windows_of(torch.arange(100), 30, 1000).shape == (3, 30)
    assert windows_of(torch.arange(100), 30, 60).shape == (2, 30)
    assert list(position_buckets(200)) == [(1, 64), (64, 128), (128, 200)]


def test_errors_ratios_recovery_and_pairs():
    spread = [float(i % 7) for i in range(50)]
    classical = (sum((x - 2.92) ** 2 for x in spread) / 49 / 50) ** 0.5
    assert mean_and_error(spread).error == pytest.approx(classical, rel=0.1)
    assert math.isnan(mean_and_error([1.0]).error)
    units = {BASE: [1.0, 2.0], STUDENT: [1.5, 2.5], WINDOW: [2.0, 3.0]}
    metric = make_metric("perplexity@8", "lower", units, exponentiate=True)
    assert metric.values[BASE].mean == pytest.approx(math.exp(1.5))
    assert metric.ratio[STUDENT] == pytest.approx(math.exp(0.5))
    assert metric.recovery == pytest.approx(0.5)
    assert (metric.difference.mean, metric.difference.error) == (pytest.approx(0.5), pytest.approx(0.0))
    # window + sinks is worse than the base by less than its noise: nothing can be recovered
    noisy = {BASE: [1.0, 2.0, 3.0], STUDENT: [1.0, 2.0, 3.0], WINDOW: [3.0, 1.0, 3.1]}
    assert make_metric("perplexity@8", "lower", noisy).recovery is None
    better = {BASE: [0.5, 0.5], STUDENT: [0.4, 0.4], WINDOW: [0.9, 0.9]}
    assert make_metric("recall@8", "higher", better).recovery is None
    flat = make_metric("recall@8", "higher", {BASE: [0.0], STUDENT: [0.0], WINDOW: [0.0]})
    assert flat.recovery is None and flat.ratio[STUDENT] is None


@pytest.mark.parametrize(
    ("expression", "passed"),
    [
        ("perplexity@8.ratio<=1.7", True),
        ("perplexity@8.ratio<1.6", False),
        ("perplexity@8>=7", True),
        ("perplexity@8.base<=4.5", True),
        ("perplexity@8.recovery>=0.5", True),
        ("perplexity@8.recovery>0.51", False),
        ("recall@8.ratio>=0.1", False),  # the base recalls nothing, so there is no ratio
        ("recall@8.untrained>=0", False),  # not measured
    ],
)
def test_gates(expression, passed):
    metrics = (
        make_metric(
            "perplexity@8", "lower", {BASE: [1.5] * 2, STUDENT: [2.0] * 2, WINDOW: [2.5] * 2}, exponentiate=True
        ),
        make_metric("recall@8", "higher", {BASE: [0.0], STUDENT: [0.5]}),
    )
    assert evaluate_gates([expression], metrics)[0].passed == passed


@pytest.mark.parametrize("text", ["perplexity", "x>=", ">=3", "x==3", "x>=y", "perplexity@8.ratoi<=1", "x.base=<3"])
def test_malformed_gates(text):
    with pytest.raises(ConfigError, match="--gate"):
        parse_gate(text)


def test_verdict_exit_code_and_files_come_from_one_object(converted, cli, tmp_path):
    gates = ["--gate", "perplexity@64.ratio<=0.5", "--gate", "recall@8>=0"]
    code, out, err = cli("eval", converted, *FLAGS, *gates, "-o", tmp_path / "report", "--json")
    assert code == 3, err
    document = json.loads(out)
    assert document["verdict"] == "FAILED: perplexity@64.ratio<=0.5" and not document["passed"]
    assert [gate["passed"] for gate in document["gates"]] == [False, True]
    assert json.loads((tmp_path / "report" / "results.json").read_bytes()) == document
    assert document["verdict"] in (tmp_path / "report" / "report.md").read_text()
    code, out, _ = cli("eval", converted, *FLAGS, "--gate", "perplexity@64.ratio<=50")
    assert code == 0 and "passed 1 gate(s)" in out
    assert (converted / "eval" / "results.json").is_file()


def test_a_base_of_other_heads_is_refused(converted, base_folder, cli):
    other = base_folder("mha_bias", name="other")
    code, _, err = cli("eval", converted, *FLAGS, "--base", other)
    assert code == 2 and "has hidden_size 32" in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("option", ["--out", "--summary-file"])
def test_where_nothing_can_be_written_is_told_before_anything_is_measured(converted, cli, tmp_path, option):
    (tmp_path / "file").write_text("")
    code, _, err = cli("eval", converted, *FLAGS, option, tmp_path / "file" if option == "--out" else tmp_path)
    assert code == 2 and option in err and len(err.strip().splitlines()) == 1, err


def test_nothing_to_recover_within_the_positions(converted, cli):
    """Lengths beyond the base's positions are left out, and with them what a gate was to be on."""
    code, _, err = cli("eval", converted, "--only", "perplexity", "--lengths", "32,600", "--min-recovery", "0.5")
    assert code == 0 or "--min-recovery" not in err
    config = json.loads((converted / "linearize.json").read_bytes())
    config["settings"]["window"] = 40
    (converted / "linearize.json").write_text(json.dumps(config))
    code, _, err = cli("eval", converted, "--only", "perplexity", "--lengths", "32,600", "--min-recovery", "0.5")
    assert code == 2 and "--min-recovery" in err


def test_min_recovery_is_a_gate(converted, cli):
    code, out, _ = cli("eval", converted, *FLAGS, "--min-recovery", "0.5", "--json")
    document = json.loads(out)
    assert [gate["expression"] for gate in document["gates"]] == [
        "perplexity@32.recovery>=0.5, or nothing lost", "perplexity@64.recovery>=0.5, or nothing lost",
    ]  # fmt: skip
    assert code == (0 if all(gate["passed"] for gate in document["gates"]) else 3)


@pytest.mark.parametrize(
    ("student", "window", "passed"),
    [
        (0.05, 0.4, True),  # most of what the window loses is there again
        (0.3, 0.4, False),
        (0.0, 0.0, True),  # nothing to recover, nothing lost
        (0.3, 0.0, False),
        (-0.3, 0.0, True),
    ],
)
def test_what_min_recovery_asks(student, window, passed):
    base = [1.0, 1.2, 0.9, 1.1]
    shifts = {BASE: 0.0, STUDENT: student, WINDOW: window}
    losses = {
        name: [x + shift + (0.02 * (-1) ** i if shift else 0.0) for i, x in enumerate(base)]
        for name, shift in shifts.items()
    }
    metric = make_metric("perplexity@64", "lower", losses, exponentiate=True)
    (gate,) = recovery_gates(0.5, [64], (metric,))
    assert gate.passed == passed
    alone = make_metric("perplexity@64", "lower", {name: x[:1] for name, x in losses.items()}, exponentiate=True)
    assert not recovery_gates(0.5, [64], (alone,))[0].passed and not recovery_gates(0.5, [32], (metric,))[0].passed


def test_the_newest_output_is_the_default(converted, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("eval", *FLAGS)
    assert code == 0 and "MODEL: linearized/tiny (the newest output)" in err
    assert "| perplexity@32 ↓ |" in out and "verdict: no gates were set; passed 5 parity checks" in out


def test_renderers_are_pure_and_complete(converted):
    results = evaluate(converted, SUITE, progress=quiet)
    text = render_markdown(results)
    assert text == render_markdown(results)
    for metric in results.metrics:
        assert f"| {metric.name} " in summary_table(results)
    for part in ("by position", "Cache of one sequence", "How it was measured", "seed 0", "torch"):
        assert part in text
    json.dumps(results.to_dict(), allow_nan=False)


def test_what_cannot_be_evaluated(converted, base_folder, cli, tmp_path):
    for flags, words in (
        (["--gate", "perplexity@99<=1"], ["perplexity@99", "did you mean"]),
        (["--gate", "kl@64.ratio<=1"], ["kl@64 has no 'ratio'", "student"]),
        (["--gate", "perplexity@64.uniform<=1"], ["perplexity@64 has no 'uniform'"]),
        (["--gate", "recall@8.recovery_over_chance>=1"], ["recall@8 has no 'recovery_over_chance'"]),
        (["--lengths", "x"], ["--lengths", "'x'"]),
        (["--lengths", "1"], ["--lengths", "at least 2"]),
        (["--data", "missing.txt"], ["missing.txt"]),
        (["--base", "./gone"], ["./gone"]),
        (["--max-tokens", "0"], ["max-tokens"]),
    ):
        code, out, err = cli("eval", converted, *([] if "--lengths" in flags else FLAGS), *flags)
        assert code == 2 and out == "", err
        assert all(word in err for word in words), err
    short = tmp_path / "short.txt"
    short.write_text("not much")
    code, _, err = cli("eval", converted, *FLAGS, "--data", short)
    assert code == 2 and "fewer than one window of 64" in err
    code, _, err = cli("eval", base_folder(name="plain"))
    assert code == 2 and "not a linearized checkpoint" in err


def test_parts_that_would_measure_nothing_are_refused(converted, cli):
    for part in ("associative", "passkey", "tasks", "choice"):
        code, _, err = cli("eval", converted, "--only", part)
        assert code == 2 and f"the suite quick has no {part}" in err
    code, out, err = cli("eval", converted, "--only", "branch", "--json")
    assert code == 0 and len(json.loads(out)["tables"]["branch_share"]) == 3, err


def test_older_results_without_a_metric_in_common_are_refused_at_once(converted, cli, monkeypatch):
    assert cli("eval", converted, "--only", "recall", "--recall", "8")[0] == 0
    monkeypatch.setattr("linearize.modeling.loading.load_student", None)
    code, _, err = cli("eval", converted, "--only", "perplexity", "--compare", converted / "eval" / "results.json")
    assert code == 2 and "no metric in common" in err


def test_every_text_is_measured(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    names = [tmp_path / f"{name}.txt" for name in ("a", "b", "short")]
    for path, text in zip(names, ("aa bb " * 400, "cc dd " * 400, "ee ff " * 5)):
        path.write_text(text)
    suite = replace(SUITE, lengths=(64,), max_tokens=300, data=tuple(map(str, names)))
    text = tokenizer.decode(text_ids_of(suite, tokenizer))
    short = len(tokenizer(names[2].read_text()).input_ids) + 1
    assert text_ids_of(suite, tokenizer).numel() == 300 and "ee ff ee ff ee ff ee ff ee ff" in text
    rest = (300 - short) / 2
    for piece, words in (("aa bb ", text.partition("c")[0]), ("cc dd ", text.partition("c")[2].partition("e")[0])):
        assert abs(len(tokenizer(words).input_ids) - rest) < 6, (piece, words)
    assert text_ids_of(replace(suite, data=suite.data[:1]), tokenizer).numel() > 300  # one text alone comes whole


def test_a_checkpoint_without_a_tokenizer_or_with_a_longer_one(base_folder, tmp_path, cli):
    base = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"[{i}]" for i in range(200)])  # as finetuned models have a [PAD] that no row stands for
    tokenizer.save_pretrained(base)
    settings = load_config(None, {"window": 12, "sinks": 2}, ["mix_options.log_mass=0.0", "calibration.when=never"])
    convert(str(base), settings, out=tmp_path / "out", verify=False, progress=quiet)
    flags = ["--only", "recall,associative", "--recall", "40", "--recall-rows", "8", "--associative", "330"]
    code, out, err = cli("eval", tmp_path / "out", *flags, "--json")
    assert code == 0, err
    assert {metric["name"] for metric in json.loads(out)["metrics"]} == {"recall@40", "associative@330"}
    for path in (tmp_path / "out").glob("tokenizer*"):
        path.unlink()
    for command in (["eval"], ["finetune", "--seq-len", "64"]):
        code, _, err = cli(command[0], tmp_path / "out", *command[1:])
        assert code == 2 and "has no tokenizer" in err and len(err.strip().splitlines()) <= 3, err


def test_greedy_is_greedy_whatever_a_checkpoint_prefers(converted):
    found = []

    def watched(lab, tokens):
        found.append(
            [
                row
                for model in lab.measure([BASE], lambda _, m: lab.greedy(m, [lab.text[:20]], 12)).values()
                for row in model
            ]
        )
        return Findings()

    for changes in ({}, {"repetition_penalty": 5.0, "num_beams": 3, "return_dict_in_generate": True}):
        path = converted.parent.parent / "base" / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linearize.evaluation.generation.measure_generation", watched)
            evaluate(converted, Suite(lengths=(), recall=(), generation=4), progress=quiet)
    assert found[0] == found[1]


def test_the_untrained_conversion_of_an_adapter_is_the_first(converted, tmp_path):
    from linearize.checkpoint.student import Student
    from linearize.modeling.loading import untrained_parameters

    parent, adapter = tmp_path / "parent", tmp_path / "adapter"
    calibration = {"text": "sample", "rows": 1, "tokens": 9, "attention_error": {}}
    training = {
        "recipe_name": "lora", "recipe": {}, "parent": str(parent), "tokens": 1, "steps": 1, "first_loss": 2.0,
        "last_loss": 1.0, "seconds": 0.1,
    }  # fmt: skip
    for folder, changes in ((parent, {}), (adapter, {"kind": "adapter", "finetune": training})):
        folder.mkdir()
        document = {**Student.read(converted).manifest.to_dict(), "calibration": calibration, **changes}
        (folder / "linearize.json").write_text(json.dumps(document))
    (parent / "config.json").write_text("{}")
    save_file({"a.mixer.b": torch.ones(2)}, parent / "untrained.safetensors")
    for folder in (parent, adapter):
        assert torch.equal(untrained_parameters(Student.read(folder))["a.mixer.b"], torch.ones(2))


def test_a_base_that_changed_or_went_is_noticed(converted, base_folder, tmp_path, cli):
    config = tmp_path / "base" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"max_position_embeddings": 512', '"max_position_embeddings": 256'))
    code, _, err = cli("eval", converted, *FLAGS)
    assert code == 2 and "has changed since the conversion" in err
    config.write_text(text)
    weights = tmp_path / "base" / "model.safetensors"
    kept = weights.read_bytes()
    base_folder(seed=1)  # the same shapes, other values
    code, _, err = cli("eval", converted, *FLAGS)
    assert code == 2 and "has changed since the conversion" in err
    weights.write_bytes(kept)
    (tmp_path / "base").rename(tmp_path / "moved")
    code, _, err = cli("eval", converted, *FLAGS)
    assert code == 2 and "is gone" in err
    assert cli("eval", converted, *FLAGS, "--base", tmp_path / "moved")[0] == 0


@pytest.mark.parametrize(
    "suite",
    [SUITE, replace(SUITE, lengths=()), replace(SUITE, lengths=(), recall=(), generation=2)],
    ids=["perplexity", "recall", "generation"],
)
def test_logits_that_are_not_finite_fail(converted, suite):
    from safetensors.torch import load_file, save_file

    path = converted / "model-00002-of-00002.safetensors"
    save_file(
        {k: torch.full_like(v, float("nan")) for k, v in load_file(path).items()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(LinearizeError, match=r"(student|untrained): its logits are not finite"):
        evaluate(converted, suite, progress=quiet)


def test_logits_that_are_not_finite_at_length_only(converted, monkeypatch):
    from linearize.modeling.branch import LinearHeads

    plain = LinearHeads.forward

    def overflowing(self, q, *arguments, **keywords):
        output, state = plain(self, q, *arguments, **keywords)
        return output * (math.nan if q.shape[1] > 40 else 1), state

    monkeypatch.setattr(LinearHeads, "forward", overflowing)
    for suite in (replace(SUITE, recall=()), replace(SUITE, lengths=())):
        with pytest.raises(LinearizeError, match="student: its logits are not finite at"):
            evaluate(converted, suite, progress=quiet)


def test_a_base_with_another_tokenizer_is_refused(converted, base_folder, cli):
    other = base_folder(name="other")
    path = other / "tokenizer.json"
    text = path.read_text()
    assert '"<|user|>"' in text
    path.write_text(text.replace("<|user|>", "<|human|>"))
    code, _, err = cli("eval", converted, *FLAGS, "--base", other)
    assert code == 2 and "tokenizer differs from the student's in 2 entries" in err and "<|human|>" in err


def test_what_is_longer_than_the_positions_is_left_out_and_said(converted, cli):
    flags = ["--lengths", "64,1024", "--recall", "8,300", "--max-tokens", "64", "--only", "perplexity,recall"]
    code, out, _ = cli("eval", converted, *flags, "--gate", "perplexity@1024<=1e9", "--json")
    document = json.loads(out)
    names = {metric["name"] for metric in document["metrics"]}
    assert "perplexity@64" in names and "recall@8" in names and not names & {"perplexity@1024", "recall@300"}
    assert "lengths 1024 left out: longer than the base's 512 positions" in document["notes"]
    assert "recall 300 left out: longer than the base's 512 positions" in document["notes"]
    # a gate on what was left out is not passed by it
    assert code == 3 and document["verdict"] == "FAILED: perplexity@1024<=1e9"


def test_a_passkey_needs_a_text_as_long_as_its_context(converted, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words only " * 3)
    with pytest.raises(ConfigError, match="fewer than one window of 200"):
        evaluate(converted, Suite(data=(str(text),), lengths=(), recall=(), passkey=(200,)), progress=quiet)


def test_lengths_and_numbers_of_passkeys(converted, cli):
    flags = ["--only", "passkey,associative", "--passkey", "64,96", "--passkey-rows", 3, "--associative", 40]
    code, out, _ = cli("eval", converted, *flags, "--recall-rows", 1, "--json")
    metrics = {metric["name"]: metric for metric in json.loads(out)["metrics"]}
    asked = [f"{name}@{length}" for length in (64, 96) for name in ("passkey", "passkey_loss")]
    assert code == 0 and metrics.keys() == {*asked, "associative@40"}
    # at three depths each
    assert [metrics[name]["values"]["student"]["n"] for name in asked] == [9] * 4
    for flag, value in (("--passkey", "63"), ("--passkey-rows", "0"), ("--associative", "0")):
        code, _, err = cli("eval", converted, flag, value)
        assert code == 2 and f"{flag}: got {value}, allowed are numbers of at least" in err
    parts = {"passkey": "passkey", "associative": "associative", "recall": "recall", "lengths": "perplexity"}
    for flag, part in parts.items():
        code, _, err = cli("eval", converted, "--only", "generation", f"--{flag}", "64")
        assert code == 2 and f"--{flag}: given, but --only leaves '{part}' out" in err


class _Greeting:
    """A tokenizer that begins whatever it is given with token 0, as many do."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1 + b for b in text.encode()])


def test_a_passkey_prompt_and_what_would_follow():
    text = torch.full((1000,), 300)
    lab = SimpleNamespace(tokenizer=_Greeting(), text=text, seed=0)
    for depth in (0.1, 0.9):
        task = passkey_task(lab, 256, depth, rows=2)
        for prompt, answer, continuation in zip(task.prompts, task.answers, task.continuations):
            assert prompt.numel() == 256 and prompt[0] == 0 and (prompt[1:] > 0).all()
            said = bytes(i - 1 for i in prompt[prompt != 300][1:].tolist()).decode()
            assert said.startswith(f" The pass key is {answer}. ") and said.endswith("The pass key is")
            assert bytes(i - 1 for i in continuation.tolist()).decode() == f" {answer}"
            # the needle's place among the rest of the text
            hay = (prompt[: (prompt == 1 + ord("R")).nonzero()[0]] == 300).sum() / (prompt == 300).sum()
            assert abs(hay - depth) < 0.02


def test_what_a_passkey_costs(converted, in_float32, tmp_path):
    """The cross-entropy of the number after its prompt; and there is as much text as the prompts take."""
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"line {i} of many"}) + "\n" for i in range(200)))
    suite = Suite(data=(str(short),), lengths=(), recall=(), passkey=(200,), passkey_rows=2, max_tokens=64)
    results = evaluate(converted, suite, progress=quiet)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = text_ids_of(suite, tokenizer)
    assert 400 <= text.numel() < 500
    lab = SimpleNamespace(tokenizer=tokenizer, text=text, seed=0)
    tasks = [passkey_task(lab, 200, depth, 2) for depth in DEPTHS]
    base, costs = tiny_base(), []
    for prompt, continuation in ((p, c) for task in tasks for p, c in zip(task.prompts, task.continuations)):
        logs = base(torch.cat([prompt, continuation])[None]).logits[0].log_softmax(-1)
        costs.append(-sum(logs[prompt.numel() - 1 + i, token].item() for i, token in enumerate(continuation)))
        costs[-1] /= continuation.numel()
    value = results.metric("passkey_loss@200").values[BASE]
    assert value.n == 6 and math.isclose(value.mean, sum(costs) / 6, rel_tol=1e-5)
    assert results.metric("passkey_loss@200").better == "lower"


def test_figures_without_a_spread(converted):
    """Every unit the same, or a single one: figures, tables, pictures and comparisons say so instead of failing."""
    flat = make_metric("recall@8", "higher", {name: [0.5, 0.5, 0.5] for name in (BASE, STUDENT, WINDOW)})
    zero = make_metric("recall@16", "higher", {name: [0.0] * 3 for name in (BASE, STUDENT, WINDOW)}, items=True)
    single = make_metric("perplexity@8", "lower", {BASE: [1.0], STUDENT: [1.5], WINDOW: [2.0]}, exponentiate=True)
    assert flat.values[STUDENT].error == 0 and flat.p_value == 1.0 and flat.recovery is None
    assert zero.ratio[STUDENT] is None and zero.p_value == 1.0
    assert single.p_value is None and math.isnan(single.values[BASE].error)
    results = evaluate(converted, replace(SUITE, lengths=(32,), recall=(), max_tokens=32), progress=quiet)
    results = replace(results, metrics=(flat, zero, single))
    document = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert document["metrics"][2]["values"]["base"]["error"] is None
    assert "| recall@8 ↑ | 0.500 ± 0.000 |" in summary_table(results)
    assert "| recall@16 ↑ | 0.000 ± 0.000 |" in summary_table(results)
    assert "4.482 ± –" in summary_table(results)
    for plot in plots_of(results):
        assert svg(plot).startswith("<svg")
    figure = {"better": "higher", "value": {"mean": 0.5, "error": 0.0}, "base": None, "difference": None, "data": ""}
    older = {"metrics": {"recall@8": figure}}
    older |= {"data": results.data, "version": 3, "path": "older.json"}
    assert [gate.passed for gate in regression_gates(older, results)[0]] == [True]
    older["metrics"]["recall@8"]["value"]["mean"] = 0.51
    assert [gate.passed for gate in regression_gates(older, results)[0]] == [False]


def test_a_regression_is_counted_from_the_base(converted):
    """Two students of one base on one text: what they share with it is no noise between them."""
    losses = torch.linspace(1.0, 4.0, 12).tolist()  # texts differ far more than students do

    def report(behind):
        student = [loss + behind + 0.001 * (i % 3) for i, loss in enumerate(losses)]
        return make_metric("perplexity@8", "lower", {BASE: losses, STUDENT: student, WINDOW: losses}, exponentiate=True)

    results = evaluate(converted, replace(SUITE, lengths=(32,), recall=(), max_tokens=32), progress=quiet)
    documents = {behind: replace(results, metrics=(report(behind),)) for behind in (0.01, 0.05)}
    for old, new, passed in ((0.01, 0.01, True), (0.05, 0.01, True), (0.01, 0.05, False)):
        document = json.loads(json.dumps(documents[old].to_dict(), allow_nan=False))
        older = {"data": results.data, "version": SCHEMA_VERSION, "path": "older.json", "metrics": {}}
        for item in document["metrics"]:
            values = {"value": item["values"][STUDENT], "base": item["values"][BASE]}
            older["metrics"][item["name"]] = {**values, "difference": item["difference"], "data": ""}
        (gate,) = regression_gates(older, documents[new])[0]
        assert gate.passed is passed and "further behind the base" in gate.expression
        error = documents[new].metrics[0].values[STUDENT].error
        assert error > abs(
            documents[0.05].metrics[0].values[STUDENT].mean - documents[0.01].metrics[0].values[STUDENT].mean
        )


def test_a_kept_part_reads_back_as_it_was(converted, tmp_path, cli, monkeypatch):
    """An error of NaN included, which one window has; and an interruption says that parts are kept, in JSON too."""
    from linearize.evaluation import recall

    flags = ["--lengths", 64, "--max-tokens", 64, "--recall", 32, "--recall-rows", 1, "--only", "perplexity,recall"]
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setitem(recall.KINDS, "recall", (stop, recall.accuracy))
        code, out, err = cli("eval", converted, *flags, "-o", tmp_path / "eval", "--json")
    assert code == 130 and "are kept" in json.loads(out)["error"], err
    code, out, err = cli("eval", converted, *flags, "-o", tmp_path / "eval", "--json")
    assert code == 0 and "kept from an interrupted run" in err
    assert [metric["name"] for metric in json.loads(out)["metrics"]][-1] == "recall@32"


def test_a_window_alone_has_no_column_with_the_window_off(base_folder, tmp_path, cli):
    code, _, err = cli(
        "convert", base_folder(), "-o", tmp_path / "none", "--mixer", "none", "--window", 12, "--no-verify"
    )
    assert code == 0, err
    code, out, err = cli("eval", tmp_path / "none", "--suite", "quick", "--lengths", 64, "--max-tokens", 128, "--json",
                         "--only", "perplexity,branch")  # fmt: skip
    values = json.loads(out)["metrics"][0]["values"]
    assert code == 0 and "window_off" not in values and values["branch_off"] == values["student"], err
