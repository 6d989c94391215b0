"""Pipelines: the three commands from one file, what is done again and what is refused."""

import json

import pytest

from linearize.evaluation.suite import SUITES

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
        patch.setattr("linearize.training.output.write_merged", stop)
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
    assert (code, out) == (2, "") and str(path) in err and err.count("\n") == 1
    assert all(line in err for line in lines) and "command line" not in err and "--" not in err


def test_a_pipeline_asks_for_what_eval_can(tmp_path):
    from linearize.workflows.pipeline import load_pipeline

    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "model: x\nout: y\neval: {passkey: [64, 96], passkey_rows: 3, associative: [40], seed: 5, data: []}"
    )
    suite = load_pipeline(path)[0].eval.chosen()
    assert (suite.passkey, suite.passkey_rows, suite.associative, suite.seed) == ((64, 96), 3, (40,), 5)
    assert suite.data == SUITES["quick"].data and suite.recall == SUITES["quick"].recall
