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

from linearize.data.samples import SAMPLES
from linearize.errors import ConfigError, LinearizeError
from linearize.evaluation.passkey import DEPTHS, passkey_task
from linearize.evaluation.suite import Suite
from linearize.evaluation.text import text_ids_of
from linearize.modeling.loading import load_student
from linearize.report.markdown import render_markdown, summary_table
from linearize.report.results import BASE, STUDENT, WINDOW, StageResult
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert
from linearize.workflows.evaluate import evaluate

BYTE_METRICS = ("bits_per_byte@64", "byte_perplexity@64")


class Plain:
    """Compute what an evaluation of `SUITE` measures, the short way: four windows of 64 tokens, both models whole."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = []
        for line in SAMPLES["sample-eval"].read_text().splitlines()[:3]:
            ids += [*self.tokenizer(json.loads(line)["text"]).input_ids, self.tokenizer.eos_token_id]
        self.windows = torch.tensor(ids[:256]).view(-1, 64)
        models = {STUDENT: load_student(folder, dtype=torch.float32), BASE: tiny_base()}
        with torch.no_grad():
            self.logs = {name: model(self.windows).logits[:, :-1].log_softmax(-1) for name, model in models.items()}

    def losses(self, model: str) -> torch.Tensor:
        return -self.logs[model].gather(-1, self.windows[:, 1:, None])

    def units(self, kind: str) -> int:
        """Count the words or the bytes of the predicted tokens."""
        texts = [self.tokenizer.decode(window[1:], skip_special_tokens=True) for window in self.windows]
        return len(" | ".join(texts).split()) - 3 if kind == "word" else len("".join(texts).encode())


@pytest.fixture(scope="module")
def evaluated(one_conversion):
    """The results of one evaluation in float32, shared by tests that only read them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearize.device.bf16_is_fast", lambda: False)
        return evaluate(one_conversion, SUITE, progress=quiet)


@pytest.fixture(scope="module")
def plain(one_conversion):
    return Plain(one_conversion)


@pytest.mark.parametrize("model", [STUDENT, BASE])
def test_perplexity_equals_a_plain_computation(evaluated, plain, model):
    value = evaluated.metric("perplexity@64").values[model]
    assert value.n == 4
    assert math.isclose(value.mean, plain.losses(model).mean().exp().item(), rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["word", "byte"])
@pytest.mark.parametrize("model", [STUDENT, BASE])
def test_perplexity_of_words_and_bytes_equals_a_plain_computation(evaluated, plain, model, kind):
    expected = math.exp(plain.losses(model).sum().item() / plain.units(kind))
    assert math.isclose(evaluated.metric(f"{kind}_perplexity@64").values[model].mean, expected, rel_tol=1e-4)


@pytest.mark.parametrize("model", [STUDENT, BASE])
def test_bits_per_byte_are_the_logarithm_of_byte_perplexity(evaluated, model):
    bits, perplexity = (evaluated.metric(name).values[model].mean for name in BYTE_METRICS)
    assert math.isclose(2**bits, perplexity, rel_tol=1e-9)


def test_divergence_equals_a_plain_computation(evaluated, plain):
    base, student = plain.logs[BASE], plain.logs[STUDENT]
    expected = (base.exp() * (base - student)).sum(-1).mean().item()
    assert math.isclose(evaluated.metric("kl@64").values[STUDENT].mean, expected, rel_tol=1e-4)


def test_agreement_equals_a_plain_computation(evaluated, plain):
    expected = (plain.logs[BASE].argmax(-1) == plain.logs[STUDENT].argmax(-1)).float().mean().item()
    assert math.isclose(evaluated.metric("agreement@64").values[STUDENT].mean, expected, rel_tol=1e-6)


def test_an_untrained_conversion_is_its_own_student(evaluated):
    values = evaluated.metric("perplexity@64").values
    assert values[STUDENT] == values["untrained"]


def test_an_untrained_branch_switched_off_leaves_the_window(evaluated):
    values = evaluated.metric("perplexity@64").values
    assert values[WINDOW] == values["branch_off"] != values[STUDENT]


def test_perplexity_by_position_has_the_mean_of_the_whole(evaluated):
    rows = evaluated.positions["perplexity@64"]
    weights = [row["end"] - row["start"] for row in rows]
    mean = sum(math.log(row[STUDENT]) * weight for row, weight in zip(rows, weights)) / sum(weights)
    assert math.isclose(math.exp(mean), evaluated.metric("perplexity@64").values[STUDENT].mean, rel_tol=1e-5)


def test_rendering_twice_gives_the_same_text(evaluated):
    assert render_markdown(evaluated) == render_markdown(evaluated)


def test_the_summary_has_a_row_of_every_metric(evaluated):
    assert all(f"| {metric.name} " in summary_table(evaluated) for metric in evaluated.metrics)


@pytest.mark.parametrize("part", ["by position", "Cache of one sequence", "How it was measured", "seed 0", "torch"])
def test_the_report_says_what_was_measured_and_how(evaluated, part):
    assert part in render_markdown(evaluated)


def test_results_are_strict_json(evaluated):
    json.dumps(evaluated.to_dict(), allow_nan=False)


def test_verdict_exit_code_and_files_come_from_one_object(converted, cli, tmp_path):
    gates = ["--gate", "perplexity@64.ratio<=0.5", "--gate", "recall@8>=0"]
    code, out, err = cli("eval", converted, *FLAGS, *gates, "-o", tmp_path / "report", "--json")
    assert code == 3, err
    document = json.loads(out)
    assert document["verdict"] == "FAILED: perplexity@64.ratio<=0.5" and not document["passed"]
    assert [gate["passed"] for gate in document["gates"]] == [False, True]
    assert json.loads((tmp_path / "report" / "results.json").read_bytes()) == document
    assert document["verdict"] in (tmp_path / "report" / "report.md").read_text()


def test_a_gate_that_holds_passes_and_the_report_lies_beside_the_model(converted, cli):
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


def test_the_newest_output_is_the_default(converted, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("eval", *FLAGS)
    assert code == 0 and "MODEL: linearized/tiny (the newest output)" in err
    assert "| perplexity@32 ↓ |" in out and "verdict: no gates were set; passed 5 parity checks" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gate", "perplexity@99<=1"], ["perplexity@99", "did you mean"]),
        (["--gate", "kl@64.ratio<=1"], ["kl@64 has no 'ratio'", "student"]),
        (["--gate", "perplexity@64.uniform<=1"], ["perplexity@64 has no 'uniform'"]),
        (["--gate", "recall@8.recovery_over_chance>=1"], ["recall@8 has no 'recovery_over_chance'"]),
        (["--lengths", "x"], ["--lengths", "'x'"]),
        (["--lengths", "1"], ["--lengths", "at least 2"]),
        (["--data", "missing.txt"], ["missing.txt"]),
        (["--base", "./gone"], ["./gone"]),
        (["--max-tokens", "0"], ["max-tokens"]),
    ],
)
def test_a_wrong_option_of_eval_is_named(converted, cli, flags, words):
    code, out, err = cli("eval", converted, *([] if "--lengths" in flags else FLAGS), *flags)
    assert code == 2 and out == "", err
    assert all(word in err for word in words), err


def test_a_text_shorter_than_a_window_is_refused(converted, cli, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("not much")
    code, _, err = cli("eval", converted, *FLAGS, "--data", short)
    assert code == 2 and "fewer than one window of 64" in err


def test_a_model_that_was_not_converted_is_refused(base_folder, cli):
    code, _, err = cli("eval", base_folder(name="plain"))
    assert code == 2 and "not a linearized checkpoint" in err


@pytest.mark.parametrize("part", ["associative", "passkey", "tasks", "choice"])
def test_a_part_that_would_measure_nothing_is_refused(converted, cli, part):
    code, _, err = cli("eval", converted, "--only", part)
    assert code == 2 and f"the suite quick has no {part}" in err


def test_the_branch_s_part_can_be_measured_alone(converted, cli):
    code, out, err = cli("eval", converted, "--only", "branch", "--json")
    assert code == 0 and len(json.loads(out)["tables"]["branch_share"]) == 3, err


def test_older_results_without_a_metric_in_common_are_refused_at_once(converted, cli, monkeypatch):
    assert cli("eval", converted, "--only", "recall", "--recall", "8")[0] == 0
    monkeypatch.setattr("linearize.modeling.loading.load_student", None)
    code, _, err = cli("eval", converted, "--only", "perplexity", "--compare", converted / "eval" / "results.json")
    assert code == 2 and "no metric in common" in err


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

    def watched(context, tokens):
        answers = context.for_each_model([BASE], lambda _, model: context.greedy(model, [context.text[:20]], 12))
        found.append([row for rows in answers.values() for row in rows])
        return StageResult()

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
    from linearize.modeling.linear_heads import LinearHeads

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


def test_passkeys_are_asked_for_at_every_length_and_depth(converted, cli):
    flags = ["--only", "passkey,associative", "--passkey", "64,96", "--passkey-rows", 3, "--associative", 40]
    code, out, _ = cli("eval", converted, *flags, "--recall-rows", 1, "--json")
    metrics = {metric["name"]: metric for metric in json.loads(out)["metrics"]}
    expected = [f"{name}@{length}" for length in (64, 96) for name in ("passkey", "passkey_loss")]
    assert code == 0 and metrics.keys() == {*expected, "associative@40"}
    # at three depths each
    assert [metrics[name]["values"]["student"]["n"] for name in expected] == [9] * 4


@pytest.mark.parametrize(("flag", "value"), [("--passkey", "63"), ("--passkey-rows", "0"), ("--associative", "0")])
def test_numbers_that_are_too_small_are_refused(converted, cli, flag, value):
    code, _, err = cli("eval", converted, flag, value)
    assert code == 2 and f"{flag}: got {value}, allowed are numbers of at least" in err


@pytest.mark.parametrize(
    ("flag", "part"),
    [("passkey", "passkey"), ("associative", "associative"), ("recall", "recall"), ("lengths", "perplexity")],
)
def test_an_option_of_a_part_that_is_left_out_is_refused(converted, cli, flag, part):
    code, _, err = cli("eval", converted, "--only", "generation", f"--{flag}", "64")
    assert code == 2 and f"--{flag}: given, but --only leaves '{part}' out" in err


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


def test_a_kept_part_reads_back_as_it_was(converted, tmp_path, cli, monkeypatch):
    """An error of NaN included, which one window has; and an interruption says that parts are saved, in JSON too."""
    flags = ["--lengths", 64, "--max-tokens", 64, "--recall", 32, "--recall-rows", 1, "--only", "perplexity,recall"]
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr("linearize.data.recall_rows.recall_task", stop)
        code, out, err = cli("eval", converted, *flags, "-o", tmp_path / "eval", "--json")
    assert code == 130 and "are saved" in json.loads(out)["error"], err
    code, out, err = cli("eval", converted, *flags, "-o", tmp_path / "eval", "--json")
    assert code == 0 and "loaded from an interrupted run" in err
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
