"""The report: statistics, what is kept, judged and drawn; the page in a real browser; pipelines."""

import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import FLAGS, ROOT, SUITE, quiet

from linearize.data.recall_rows import associative_task
from linearize.errors import Interrupted
from linearize.evaluation import recall
from linearize.evaluation.generation import health
from linearize.evaluation.recall import associative_accuracy
from linearize.evaluation.suite import SUITES, Suite, within_positions
from linearize.modeling.readout import Readout
from linearize.plan import NO_BRANCH
from linearize.report import card
from linearize.report.html import render_html
from linearize.report.plots import plots_of
from linearize.report.results import BASE, MODELS, STUDENT, WINDOW, json_schema, make_metric
from linearize.report.statistics import bootstrap_error, mcnemar, sign_flip_test, student_quantile
from linearize.workflows import evaluate as evaluation
from linearize.workflows.evaluate import evaluate

WHOLE = replace(
    SUITES["quick"], lengths=(32, 64), recall=(8, 40), associative=(8, 40), passkey=(100,), efficiency=(32, 64),
    max_tokens=256, recall_rows=3, generation=6,
)  # fmt: skip


def test_bootstrap_and_paired_tests():
    values = [float((7 * i) % 11) for i in range(200)]
    mean = sum(values) / 200
    classical = math.sqrt(sum((v - mean) ** 2 for v in values) / 199 / 200)
    assert bootstrap_error(values) == pytest.approx(classical, rel=0.1)
    assert bootstrap_error([0.0, 2.0]) == pytest.approx(1.0, rel=0.1)  # and so for few
    assert bootstrap_error(values) == bootstrap_error(values)
    assert sign_flip_test([0.0] * 5) == 1.0 and sign_flip_test([1.0]) is None
    # of 16 choices of signs two are as far from 0, and of 4 that many
    assert sign_flip_test([1.0, 1.1, 0.9, 1.2]) == 2 / 16 and sign_flip_test([1.0, 1.1]) == 2 / 4
    assert sign_flip_test([1.0, -1.1, 0.9, -0.8]) == 1  # their sum is 0
    many = [0.3 + math.sin(i) for i in range(60)]
    normal = math.erfc(math.sqrt(60) * 0.3 / (0.7071 * math.sqrt(2)))
    assert sign_flip_test(many) == sign_flip_test(many) and sign_flip_test(many) == pytest.approx(normal, abs=0.005)
    # tables of Student's t
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (60, 2.000)):
        assert student_quantile(freedom) == pytest.approx(quantile, abs=0.01)
    # 1 against 9 discordant items: 2 (C(10,0) + C(10,1)) / 2^10
    assert mcnemar([1.0] + [0.0] * 9 + [1.0] * 4, [0.0] + [1.0] * 9 + [1.0] * 4) == pytest.approx(22 / 1024)
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0


@pytest.mark.parametrize("distance", [1, 8, 64, 200, 256, 1024])
def test_rows_are_as_long_as_positions_are_asked_for(distance):
    """What is left out for want of positions would not fit, and what is not left out fits."""
    for kind, make in (("recall", recall.recall_task), ("associative", associative_task)):
        tokens = make(distance, 1, 300, 0, seed=0).ids.shape[1]
        suite = Suite(**{"recall": (), kind: (distance,)})
        for positions, stays in ((tokens, (distance,)), (tokens - 1, ())):
            assert getattr(within_positions(suite, {"max_position_embeddings": positions})[0], kind) == stays


def test_the_card_says_what_stands_in_place_of_softmax():
    branch = {"window": 64, "sinks": 4, "mixer": "gla", "mix": "sum"}
    alone = {"window": 128, "sinks": 2, "mixer": NO_BRANCH, "mix": NO_BRANCH}
    assert card._replacement([alone, alone]) == "a window of 128 keys and 2 sinks"
    assert card._replacement([branch, alone]) == (
        "a window of 64 keys, 4 sinks and a recurrent branch (gla, mixed by `sum`); "
        "elsewhere a window of 128 keys and 2 sinks"
    )
    assert card._replacement([]) == "nothing"


def test_recovery_needs_a_loss_that_stands_out():
    losses = {BASE: [1.0, 1.2, 0.9, 1.1], STUDENT: [1.1, 1.3, 1.0, 1.2]}
    for window, recovery in (([1.2, 1.41, 1.09, 1.3], 0.5), ([1.0, 1.2, 1.5, 1.3], None)):
        metric = make_metric("perplexity@64", "lower", {**losses, WINDOW: window})
        assert metric.recovery == (recovery if recovery is None else pytest.approx(recovery, abs=0.01))
    alone = {name: values[:1] for name, values in {**losses, WINDOW: [9.0]}.items()}
    assert make_metric("perplexity@64", "lower", alone).recovery is None


def test_chance():
    units = {BASE: [1.0, 1.0, 1.0, 0.0], STUDENT: [1.0, 1.0, 0.0, 0.0]}
    metric = make_metric("arc_acc", "higher", units, chance=0.25, items=True)
    assert metric.recovery_over_chance == pytest.approx(0.5) and metric.p_value == 1.0


def test_associative_rows():
    head = Readout(torch.eye(1000))
    for distance in (2, 40, 300):
        task = associative_task(distance, 2, 1000, 7, seed=0)
        row, pairs = task.ids[0].tolist(), task.counted
        first = dict(zip(row[1 : 1 + 2 * pairs : 2], row[2 : 2 + 2 * pairs : 2]))
        again = dict(zip(row[-2 * pairs :: 2], row[-2 * pairs + 1 :: 2]))
        assert first == again and len(first) == pairs
        assert len(row) - 1 - 2 * pairs >= distance
        perfect = torch.cat([torch.eye(1000)[task.ids[0][1:]], torch.zeros(1, 1000)])
        assert associative_accuracy(perfect, head, task.ids[0], pairs) == 1.0
        assert associative_accuracy(perfect.roll(1, 0), head, task.ids[0], pairs) == 0.0


def test_associative_rows_longer_than_the_vocabulary():
    task = associative_task(1000, 2, 320, 7, seed=0)
    row, pairs = task.ids[0].tolist(), task.counted
    assert len(row) == 1 + 1000 + 2 * pairs and pairs == 32
    told = set(row[1 : 1 + 2 * pairs])
    assert not told & set(row[1 + 2 * pairs : -2 * pairs]) and set(row[-2 * pairs :]) == told
    assert associative_task(100, 1, 40, None, seed=0).counted == 10


def test_health():
    stuck, lively = health([1, 2] * 10, stopped=False), health(list(range(20)), stopped=True)
    assert stuck["repetition"] > 0.8 and stuck["distinct2"] < 0.2 and stuck["stopped"] == 0
    assert lively == {"repetition": 0.0, "distinct2": 1.0, "length": 20.0, "stopped": 1.0}


@pytest.fixture
def whole(converted, tmp_path):
    """Everything measured on a tiny model, and its folder."""
    out = tmp_path / "report"
    return evaluate(converted, WHOLE, out=out, progress=quiet), out


def test_everything_is_measured_written_and_valid(whole):
    results, out = whole
    measured = {metric.name: metric.values.keys() for metric in results.metrics}
    for name, fields in WHOLE.figures().items():
        assert measured[name] == fields & MODELS.keys(), name
    assert {"efficiency", "branch_share", "samples", "passkey@100"} <= results.tables.keys()
    assert len(results.checks) == 5 and results.passed
    metric = results.metric("perplexity@64")
    assert metric.values["window_off"].mean != metric.values["student"].mean
    bits, loss = results.metric("bits_per_byte@64").values["student"].mean, math.log2(metric.values["student"].mean)
    assert 0 < bits < loss
    shares = [v for row in results.tables["branch_share"] for heads in row["shares"].values() for v in heads]
    assert len(shares) == 18 and all(0 < share < 1 for share in shares)
    row = results.tables["efficiency"][1]
    assert row["student_cache_bytes"] < row["base_cache_bytes"] and row["student_decode_tokens_per_second"] > 0

    import jsonschema

    document = json.loads((out / "results.json").read_bytes())
    published = json.loads((ROOT / "linearize" / "report" / "results.schema.json").read_bytes())
    assert published == json_schema(), "run scripts/make_schema.py"
    jsonschema.validate(document, published)
    for plot in plots_of(results):
        rows = (out / "plots" / f"{plot.name}.csv").read_text().splitlines()
        assert len(rows) == len(plot.rows()) > 1
        assert (out / "plots" / f"{plot.name}.png").stat().st_size > 5000
    assert not (out / evaluation.UNFINISHED).exists()
    page = (out / "report.html").read_text()
    assert (
        page == render_html(results)
        and "http://" not in page.replace("http://www.w3.org", "")
        and "<script" not in page
    )


def test_an_interrupted_evaluation_goes_on(converted, tmp_path, monkeypatch):
    suite, out = replace(SUITE, parity=True), tmp_path / "report"
    real, calls = recall.measure_recall, []

    def stopped(lab, **settings):
        if settings["distance"] == 40:
            raise KeyboardInterrupt
        return real(lab, **settings)

    monkeypatch.setattr(recall, "measure_recall", stopped)
    with pytest.raises(Interrupted, match="are kept"):
        evaluate(converted, suite, out=out, progress=quiet)
    assert not (out / "results.json").exists() and len(list((out / evaluation.UNFINISHED).iterdir())) == 4
    monkeypatch.setattr(recall, "measure_recall", lambda lab, **s: calls.append(s["distance"]) or real(lab, **s))
    messages: list[str] = []
    results = evaluate(converted, suite, out=out, progress=messages.append)
    assert calls == [40] and sum("kept from an interrupted run" in m for m in messages) == 4
    fresh = evaluate(converted, suite, progress=quiet)
    assert results.metrics == fresh.metrics and results.checks == fresh.checks


def test_a_model_that_decodes_otherwise_fails_the_report(converted, monkeypatch, cli):
    from linearize.modeling import cache

    plain = cache.WindowCache.extend

    def forgetful(self, keys, values, raw_keys, padding_mask):
        if self.values is not None:
            self.values = self.values * 0
        return plain(self, keys, values, raw_keys, padding_mask)

    monkeypatch.setattr(cache.WindowCache, "extend", forgetful)
    code, out, _ = cli("eval", converted, "--only", "parity", "--json")
    document = json.loads(out)
    assert code == 3 and document["verdict"].startswith("FAILED: parity: cached = uncached")


def test_gates_from_a_file_and_regressions(converted, cli, tmp_path):
    flags = [*FLAGS, "--only", "perplexity,recall"]
    gates = tmp_path / "gates.txt"
    gates.write_text("# for the release\nperplexity@64.ratio<=50  # generous\n\nrecall@8>=0\n")
    summary = tmp_path / "summary.md"
    options = ["--gate", gates, "-o", tmp_path / "old", "--summary-file", summary, "--json"]
    code, out, err = cli("eval", converted, *flags, *options)
    assert code == 0, err
    assert [gate["expression"] for gate in json.loads(out)["gates"]] == ["perplexity@64.ratio<=50", "recall@8>=0"]
    assert "passed 2 gate(s)" in summary.read_text() and "| perplexity@64 ↓ |" in summary.read_text()

    older = tmp_path / "old" / "results.json"
    code, out, _ = cli("eval", converted, *flags, "--compare", older, "--json")
    assert code == 0 and all(gate["passed"] for gate in json.loads(out)["gates"])
    document = json.loads(older.read_bytes())
    for metric in document["metrics"]:
        if metric["name"] == "perplexity@64":
            metric["values"]["student"] = {"mean": metric["values"]["student"]["mean"] / 2, "error": 0.01, "n": 4}
    document["schema_version"] = 1  # an older schema reads as well
    older.write_text(json.dumps(document))
    code, out, _ = cli("eval", converted, *flags, "--compare", older, "--json")
    assert code == 3 and "perplexity@64 worse than before" in json.loads(out)["verdict"]
    for change, words in (({"schema_version": 99}, "schema version 99"), ({"data": {}}, "measured on other data")):
        older.write_text(json.dumps({**document, **change}))
        code, _, err = cli("eval", converted, *flags, "--compare", older)
        assert code == 2 and words in err
    older.write_text("{}")
    assert "is not a results.json" in cli("eval", converted, *flags, "--compare", older)[2]


def test_results_of_an_older_schema_are_compared_where_they_mean_the_same(converted, cli, tmp_path):
    from helpers import ROOT

    flags = [*FLAGS, "--only", "perplexity,recall"]
    now, older = tmp_path / "now", tmp_path / "older.json"
    assert cli("eval", converted, *flags, "-o", now)[0] == 0
    document = json.loads((now / "results.json").read_bytes())
    document["schema_version"] = 1
    # what the first version did not have
    for key in ("tables", "checks"):
        del document[key]
    document["metrics"] = [m for m in document["metrics"] if not m["name"].startswith(("word_", "byte_"))]
    for metric in document["metrics"]:
        for key in ("p_value", "chance", "recovery_over_chance", "data"):
            del metric[key]
    older.write_text(json.dumps(document))
    code, out, err = cli("eval", converted, *flags, "--compare", older, "--json")
    assert code == 0, err
    compared = json.loads(out)
    expressions = [gate["expression"].split()[0] for gate in compared["gates"]]
    assert "perplexity@64" in expressions and "recall@40" in expressions and "bits_per_byte@64" not in expressions
    left_out = "not compared, as schema version 1 has them otherwise: bits_per_byte@32, bits_per_byte@64"
    assert left_out in compared["notes"]
    for metric in document["metrics"]:
        if metric["name"] == "recall@8":
            metric["values"]["student"] = {"mean": 2.0, "error": 0.01, "n": 3}
    older.write_text(json.dumps(document))
    code, out, _ = cli("eval", converted, *flags, "--compare", older)
    assert code == 3 and "FAILED: recall@8 worse than before" in out
    # a real file of the first version reads, and was measured on other data
    first = ROOT / "scripts" / "results" / "wikitext-100k.json"
    code, _, err = cli("eval", converted, "--only", "perplexity", "--lengths", "512", "--compare", first)
    assert code == 2 and "was measured on other data" in err
    for version in ("soon", None, [3]):
        older.write_text(json.dumps({**document, "schema_version": version}))
        code, _, err = cli("eval", converted, *flags, "--compare", older)
        assert code == 2 and "is not a results.json" in err


def test_the_card_carries_the_evaluation_once(converted, cli):
    for _ in range(2):
        assert cli("eval", converted, *FLAGS, "--only", "perplexity,recall")[0] == 0
    card = (converted / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "`linearize eval PATH` measures it" in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert "base_model" in metadata and {"perplexity@32", "perplexity@64"} <= {metric["name"] for metric in metrics}


def test_tasks_of_the_harness(converted, cli, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'linearize[tasks]')")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"query": f"{i} and", "choices": [f"{j} more" for j in range(4)], "gold": i % 4} for i in range(12)]
    (data / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [{"context": f"the number {i} is", "continuation": "odd"} for i in range(5)]
    (data / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    from helpers import ROOT

    maker = [sys.executable, ROOT / "scripts" / "make_tasks.py", data, tmp_path / "tasks"]
    subprocess.run(maker, check=True, capture_output=True)
    flags = [
        "--only",
        "tasks",
        "--tasks",
        "toy,words",
        "--tasks-dir",
        tmp_path / "tasks",
        "--task-limit",
        "8",
        "--json",
    ]
    code, out, err = cli("eval", converted, *flags, "--gate", "toy_acc>=0")
    assert code == 0, err
    metrics = {metric["name"]: metric for metric in json.loads(out)["metrics"]}
    assert metrics["toy_acc"]["chance"] == 0.25 and metrics["toy_acc"]["values"]["student"]["n"] == 8
    assert metrics["words_acc"]["chance"] is None and metrics["words_acc"]["values"]["base"]["n"] == 5
    code, _, err = cli("eval", converted, *flags[:-1], "-o", tmp_path / "again")
    assert code == 0 and "the base's answers are at hand" in err
    code, _, err = cli("eval", converted, "--only", "tasks", "--tasks", "toyy", "--tasks-dir", tmp_path / "tasks")
    assert code == 2 and "did you mean 'toy'" in err


PIPELINE = """
model: {base}
out: {out}
convert: {{window: 12, sinks: 2, mix_options: {{log_mass: 0.0}}}}
finetune: {{recipe: lora, tokens: 128, seq_len: 32, lora: {{rank: 2, alpha: 4}}}}
eval: {{only: "perplexity", lengths: [512], max_tokens: 4096, gates: ["perplexity@512.ratio<={limit}"]}}
"""


def test_a_pipeline_goes_on_and_gates(base_folder, cli, tmp_path):
    path, out = tmp_path / "pipeline.yaml", tmp_path / "made"
    path.write_text(PIPELINE.format(base=base_folder(), out=out, limit=100))
    code, text, err = cli("run", path)
    assert code == 0, err
    assert "verdict: passed 1 gate(s)" in text and (out / "eval" / "report.html").is_file()
    stamps = [(out / name / "linearize.json").stat().st_mtime_ns for name in ("converted", "finetuned")]
    path.write_text(PIPELINE.format(base=tmp_path / "base", out=out, limit=0.01))
    code, text, err = cli("run", path, "--json")
    assert code == 3 and "FAILED" in json.loads(text)["results"]["verdict"]
    assert "converted is up to date" in err and "finetuned is up to date" in err
    assert stamps == [(out / name / "linearize.json").stat().st_mtime_ns for name in ("converted", "finetuned")]
    path.write_text(path.read_text().replace("tokens: 128", "tokens: 96"))
    code, _, err = cli("run", path)
    assert code == 3 and "converted is up to date" in err and "finetuned is up to date" not in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\nout: y\nconvrt: {}\n", ["convrt", "did you mean 'convert'"]),
        ("model: x\n", ["out: missing, and has no default"]),
        ("model: x\nout: y\nconvert: {windw: 3}\n", ["windw", "did you mean 'window'"]),
        ("model: x\nout: y\neval: {gate: []}\n", ["eval.gate", "did you mean 'gates'"]),
        ("model: x\nout: y\neval: {suite: qick}\n", ["eval: suite: got 'qick'", "did you mean 'quick'"]),
        ("model: x\nout: y\neval: {passkey: [20]}\n", ["eval.passkey.0", "greater than or equal to 64"]),
        (
            "model: x\nout: y\neval: {only: recall, lengths: [64]}\n",
            ["eval: lengths: given, but --only leaves 'perplexity'"],
        ),
        ("model: x\nout: y\neval: {gates: [a<=1], gates: []}\n", ["'gates' stands twice"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_pipeline_with_mistakes(cli, tmp_path, text, words):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    code, out, err = cli("run", path)
    assert code == 2 and out == "" and all(word in err for word in words), err


@pytest.mark.parametrize(
    ("wanted", "replacement", "words"),
    [
        ("perplexity@512.ratio<={limit}", "recall@64>=0", "--gate: 'recall@64' is not measured here"),
        ("max_tokens: 4096", "data: [gone.txt]", "gone.txt"),
        ("recipe: lora", "recipe: lora, data: [gone.jsonl]", "gone.jsonl"),
        ("max_tokens: 4096", "compare: older.json", "older.json"),
        ("max_tokens: 4096", "control: gone", "gone"),
        ("max_tokens: 4096", "summary_file: {base}/config.json/x", "--summary-file"),
        ("lengths: [512]", "lengths: [12], min_recovery: 0.9", "--min-recovery"),
        ("max_tokens: 4096", "task_limit: 0", "eval: task_limit: got 0"),
        ("seq_len: 32", "seq_len: 14", "never leaves the window of 12 keys and 2 sinks"),
    ],
)
def test_a_pipeline_that_cannot_end_does_not_start(base_folder, cli, tmp_path, wanted, replacement, words):
    path, out = tmp_path / "pipeline.yaml", tmp_path / "made"
    assert wanted in PIPELINE
    path.write_text(PIPELINE.replace(wanted, replacement).format(base=base_folder(), out=out, limit=100))
    code, _, err = cli("run", path)
    assert code == 2 and words in err and not out.exists(), err


def test_a_pipeline_that_was_stopped_can_begin_again_with_other_settings(base_folder, cli, tmp_path, monkeypatch):
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.format(base=base_folder(), out=tmp_path / "made", limit=100))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the last state, before anything is written
        patch.setattr("linearize.workflows.finetune._write_merged", stop)
        assert cli("run", path)[0] == 130
    path.write_text(path.read_text().replace("tokens: 128", "tokens: 96"))
    code, _, err = cli("run", path)
    assert code == 2 and "recipe.tokens: was 128, is 96" in err and "--restart" in err
    assert cli("run", path, "--restart")[0] == 0


def test_a_pipeline_reads_its_text_before_it_trains(base_folder, cli, tmp_path):
    path, short = tmp_path / "pipeline.yaml", tmp_path / "short.txt"
    short.write_text("too little")
    older = tmp_path / "first" / "eval" / "results.json"
    base = base_folder()
    path.write_text(PIPELINE.format(base=base, out=tmp_path / "first", limit=100))
    assert cli("run", path)[0] == 0
    for given, words in (
        (f"data: [{short}]", "fewer than one window of 512"),
        (f"max_tokens: 2048, compare: {older}", "was measured on other data"),
    ):
        out = tmp_path / given[:4]
        path.write_text(PIPELINE.replace("max_tokens: 4096", given).format(base=base, out=out, limit=100))
        code, _, err = cli("run", path)
        assert code == 2 and words in err, err
        assert (out / "converted").is_dir() and not (out / "finetuned").exists()


def test_a_pipeline_does_again_what_other_files_would_change(base_folder, cli, tmp_path):
    path, corpus = tmp_path / "pipeline.yaml", tmp_path / "corpus.txt"
    corpus.write_text("one thing after another " * 80)
    text = PIPELINE.replace("recipe: lora", f"recipe: lora, data: [{corpus}]").partition("eval:")[0]
    path.write_text(text.format(base=base_folder(), out=tmp_path / "made"))
    assert cli("run", path)[0] == 0
    corpus.write_text("the other thing before one " * 80)
    code, _, err = cli("run", path)
    assert code == 0 and "converted is up to date" in err and "finetuned is up to date" not in err
    base_folder(seed=1)  # other weights in the same folder
    code, _, err = cli("run", path)
    assert code == 0 and "up to date" not in err


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("convert: {windo: 3}", ["convert: windo: unknown key", "did you mean 'window'"]),
        ("finetune: {recipe: lora, tokns: 3}", ["finetune: tokns: unknown key", "did you mean 'tokens'"]),
        ("eval: {lengths: [1]}", ["eval.lengths.0: got 1; input should be greater than or equal to 2"]),
        ("eval: {suite: x}", ["eval: suite: got 'x'"]),
        ("eval: {min_recovery: .nan, gate: x}", ["min_recovery: got nan", "eval.gate: unknown key", "'gates'"]),
        ("evl: {}", ["evl: unknown key", "did you mean 'eval'"]),
    ],
)
def test_a_pipeline_s_mistakes_are_told_by_its_name(text, lines, cli, tmp_path):
    path = tmp_path / "nightly.yaml"
    path.write_text(f"model: x\nout: {tmp_path / 'out'}\n{text}\n")
    code, out, err = cli("run", path)
    assert (code, out) == (2, "") and err.count(str(path)) == len(err.splitlines())
    assert all(line in err for line in lines) and "command line" not in err and "--" not in err


def test_a_pipeline_asks_for_what_eval_can(tmp_path):
    from linearize.evaluation.suite import SUITES
    from linearize.workflows.pipeline import load_pipeline

    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "model: x\nout: y\neval: {passkey: [64, 96], passkey_rows: 3, associative: [40], seed: 5, data: []}"
    )
    suite = load_pipeline(path)[0].eval.chosen()
    assert (suite.passkey, suite.passkey_rows, suite.associative, suite.seed) == ((64, 96), 3, (40,), 5)
    assert suite.data == SUITES["quick"].data and suite.recall == SUITES["quick"].recall


def pixels(path) -> tuple[int, int, set]:
    """Width, height and the distinct colours of a PNG that Chromium wrote (8-bit RGB or RGBA, not interlaced)."""
    data = path.read_bytes()
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    step = {2: 3, 6: 4}[kind]
    packed, position = b"", 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        if data[position + 4 : position + 8] == b"IDAT":
            packed += data[position + 8 : position + 8 + length]
        position += 12 + length
    raw, stride = zlib.decompress(packed), width * step
    previous, colours = bytearray(stride), set()
    for y in range(height):
        start = y * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            a, b = (line[i - step] if i >= step else 0), previous[i]
            c = previous[i - step] if i >= step else 0
            if kind == 1:
                line[i] = (line[i] + a) & 255
            elif kind == 2:
                line[i] = (line[i] + b) & 255
            elif kind == 3:
                line[i] = (line[i] + (a + b) // 2) & 255
            elif kind == 4:
                p = a + b - c
                nearest = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
                line[i] = (line[i] + nearest) & 255
        colours.update(tuple(line[i : i + 3]) for i in range(0, stride, step))
        previous = line
    return width, height, colours


def test_the_page_in_a_browser(whole, tmp_path):
    """Headless Chromium opens the file offline, at a phone's width, and the verdict and every curve are in the picture."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    results, out = whole
    common = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    url = (out / "report.html").as_uri()
    shot = tmp_path / "shot.png"
    for width in (390, 1200):
        subprocess.run(
            [*common, f"--window-size={width},2600", f"--screenshot={shot}", url],
            check=True,
            capture_output=True,
            timeout=120,
        )
        seen_width, _, colours = pixels(shot)
        assert seen_width == width
        # the banner, the base's and the student's curves, the map's colours
        for colour in ((0x4A, 0x55, 0x68), (0x22, 0x22, 0x22), (0x0B, 0x6B, 0xCB), (0xC2, 0x3B, 0x3B)):
            assert colour in colours, f"{colour} is not in the picture at {width} pixels"
    dom = subprocess.run([*common, "--dump-dom", url], check=True, capture_output=True, text=True, timeout=120).stdout
    assert "Verdict: no gates were set; passed 5 parity checks" in dom
    for plot in plots_of(results):
        assert f'id="{plot.name}"' in dom


def test_bench_model_is_the_efficiency_part_alone(converted, cli):
    code, out, err = cli("bench", "model", converted, "--lengths", "32,64", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [row["length"] for row in document["rows"]] == [32, 64] and document["crossover"][0].startswith("prefill: ")
    assert document["rows"][1]["student_cache_bytes"] < document["rows"][1]["base_cache_bytes"]
    code, out, _ = cli("bench", "model", converted, "--lengths", "32,64")
    assert code == 0 and "| 64 |" in out and "decode: " in out


def test_suites_grow():
    quick, standard, full = (SUITES[name] for name in ("quick", "standard", "full"))
    for name in ("lengths", "recall", "associative", "passkey", "efficiency"):
        assert set(getattr(quick, name)) <= set(getattr(standard, name)) | {512} and set(
            getattr(standard, name)
        ) <= set(getattr(full, name)), name
    assert quick.max_tokens < standard.max_tokens < full.max_tokens and isinstance(quick, Suite)


def test_the_pipeline_of_the_readme_loads(tmp_path):
    from helpers import ROOT

    from linearize.workflows.pipeline import load_pipeline

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text[text.index("# pipeline.yaml") :].partition("```")[0]
    (tmp_path / "pipeline.yaml").write_text(example)
    pipeline, settings, recipe = load_pipeline(tmp_path / "pipeline.yaml")
    assert settings.keep_softmax == "18:2,17:1,8:0" and recipe.tokens == 300_000 and len(pipeline.eval.gates) == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["list"], "Missing argument 'kind'. Choose from: mixers, families"),
        (
            ["eval", ".", "--min-recovery", "0.9", "--only", "recall"],
            "--min-recovery: got 0.9, but perplexity is measured at no",
        ),
        (["eval", ".", "--seed", "99999999999999"], "--seed: got 99999999999999"),
        (
            ["eval", ".", "--choice", "a/test.jsonl", "--choice", "b/test.jsonl"],
            "--choice: got 'a/test.jsonl' and another",
        ),
        (["finetune", ".", "--set", "seed=4294967296"], "command line: seed: got 4294967296"),
        (["eval", ".", "--gate", "nofile.txt"], "--gate: 'nofile.txt' is neither a file here nor a gate"),
        (["eval", ".", "--only", "perplexity", "--tasks", "piqa"], "--tasks: given, but --only leaves 'tasks' out"),
        (["finetune", ".", "--lr", "-3"], "command line: optimizer.lr: got -3.0"),
        (["finetune", ".", "--set", "lora.rank=0"], "command line: lora.rank: got 0"),
    ],
)
def test_one_line_that_names_what_was_given(converted, cli, command, words):
    code, _, err = cli(*(str(converted) if part == "." else part for part in command))
    assert code == 2 and words in err and len([line for line in err.splitlines() if "error:" in line]) == 1


@pytest.mark.parametrize(
    ("option", "content", "words"),
    [
        ("--gate", b"# none yet\n", "holds no gate"),
        ("--gate", b"\xff\xfe", "cannot be read as a file of gates"),
        ("--compare", b'{"schema_version": 3, "metrics": []}', "is not a results.json"),
        ("--data", b"three short words", "fewer than one window"),
    ],
)
def test_files_that_say_nothing(converted, cli, tmp_path, option, content, words):
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    code, _, err = cli("eval", converted, "--only", "parity", option, path)
    assert code == 2 and words in err, err
