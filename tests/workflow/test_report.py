"""The report: statistics, what is kept, judged and drawn; the page in a real browser; pipelines."""

import copy
import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import jsonschema
import pytest
import yaml
from helpers import FLAGS, ROOT, SUITE, copy_conversion, quiet

from linearize.errors import Interrupted
from linearize.evaluation import recall
from linearize.evaluation.suite import SUITES
from linearize.report.html import render_html
from linearize.report.pictures import plots_of
from linearize.report.results import MODELS, STUDENT, json_schema
from linearize.workflows import evaluate as evaluation
from linearize.workflows.evaluate import evaluate

WHOLE = replace(
    SUITES["quick"], lengths=(32, 64), recall=(8, 40), associative=(8, 40), passkey=(100,), efficiency=(32, 64),
    max_tokens=256, recall_rows=3, generation=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(one_conversion, tmp_path_factory):
    """Return (results, folder) of everything that can be measured on a tiny model."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "report"
    return evaluate(copy_conversion(one_conversion, folder), WHOLE, out=out, progress=quiet), out


def test_every_figure_is_measured_of_every_model(whole):
    measured = {metric.name: metric.values.keys() for metric in whole[0].metrics}
    for name, fields in WHOLE.metrics().items():
        assert measured[name] == fields & MODELS.keys(), name


@pytest.mark.parametrize("table", ["efficiency", "branch_share", "samples", "passkey@100"])
def test_every_table_is_there(whole, table):
    assert table in whole[0].tables


def test_all_parity_checks_pass(whole):
    assert len(whole[0].checks) == 5 and whole[0].passed


def test_the_branch_without_its_window_is_another_model(whole):
    values = whole[0].metric("perplexity@64").values
    assert values["window_off"].mean != values[STUDENT].mean


def test_a_byte_takes_fewer_bits_than_a_token(whole):
    bits, perplexity = (whole[0].metric(name).values[STUDENT].mean for name in ("bits_per_byte@64", "perplexity@64"))
    assert 0 < bits < math.log2(perplexity)


def test_the_branch_s_share_is_told_of_every_head(whole):
    shares = [v for row in whole[0].tables["branch_share"] for heads in row["shares"].values() for v in heads]
    assert len(shares) == 18 and all(0 < share < 1 for share in shares)


def test_efficiency_compares_cache_and_speed(whole):
    row = whole[0].tables["efficiency"][1]
    assert row["student_cache_bytes"] < row["base_cache_bytes"] and row["student_decode_tokens_per_second"] > 0


def published_schema() -> dict:
    return json.loads((ROOT / "linearize" / "report" / "results.schema.json").read_bytes())


def test_the_published_schema_is_that_of_the_code():
    assert published_schema() == json_schema(), "run scripts/make_schema.py"


def test_results_fit_the_published_schema(whole):
    jsonschema.validate(json.loads((whole[1] / "results.json").read_bytes()), published_schema())


def test_every_plot_is_written_as_table_and_picture(whole):
    results, out = whole
    for plot in plots_of(results):
        rows = (out / "plots" / f"{plot.name}.csv").read_text().splitlines()
        assert len(rows) == len(plot.rows()) > 1
        assert (out / "plots" / f"{plot.name}.png").stat().st_size > 5000


def test_nothing_unfinished_stays_beside_a_report(whole):
    assert not (whole[1] / evaluation.UNFINISHED).exists()


def test_the_page_is_what_the_renderer_makes_of_the_results(whole):
    assert (whole[1] / "report.html").read_text() == render_html(whole[0])


def test_the_page_fetches_and_runs_nothing(whole):
    page = (whole[1] / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_an_interrupted_evaluation_goes_on(converted, tmp_path, monkeypatch):
    suite, out = replace(SUITE, parity=True), tmp_path / "report"
    real, calls = recall.measure_recall, []

    def stopped(lab, **settings):
        if settings["distance"] == 40:
            raise KeyboardInterrupt
        return real(lab, **settings)

    monkeypatch.setattr(recall, "measure_recall", stopped)
    with pytest.raises(Interrupted, match="are saved"):
        evaluate(converted, suite, out=out, progress=quiet)
    assert not (out / "results.json").exists() and len(list((out / evaluation.UNFINISHED).glob("*.json"))) == 4
    monkeypatch.setattr(recall, "measure_recall", lambda lab, **s: calls.append(s["distance"]) or real(lab, **s))
    messages: list[str] = []
    results = evaluate(converted, suite, out=out, progress=messages.append)
    assert calls == [40] and sum("loaded from an interrupted run" in m for m in messages) == 4
    fresh = evaluate(converted, suite, progress=quiet)
    assert results.metrics == fresh.metrics and results.checks == fresh.checks


def test_a_model_that_decodes_otherwise_fails_the_report(converted, monkeypatch, cli):
    from linearize.modeling.window_cache import WindowCache

    plain = WindowCache.extend

    def forgetful(self, keys, values, recurrent_inputs, padding_mask):
        if self.values is not None:
            self.values = self.values * 0
        return plain(self, keys, values, recurrent_inputs, padding_mask)

    monkeypatch.setattr(WindowCache, "extend", forgetful)
    code, out, _ = cli("eval", converted, "--only", "parity", "--json")
    document = json.loads(out)
    assert code == 3 and document["verdict"].startswith("FAILED: parity: cached = uncached")


TWO_PARTS = [*FLAGS, "--only", "perplexity,recall"]


@pytest.fixture(scope="module")
def first_results(one_conversion, tmp_path_factory):
    """Return the content of results.json of a first evaluation."""
    folder = tmp_path_factory.mktemp("first")
    evaluate(copy_conversion(one_conversion, folder), SUITE, out=folder / "report", progress=quiet)
    return json.loads((folder / "report" / "results.json").read_bytes())


@pytest.fixture
def as_first_schema(first_results):
    """Return the first results as schema version 1 had them, without what came later."""
    document = {key: value for key, value in first_results.items() if key not in ("tables", "checks")}
    later = ("p_value", "chance", "recovery_over_chance", "data")
    metrics = [
        {key: value for key, value in metric.items() if key not in later}
        for metric in document["metrics"]
        if not metric["name"].startswith(("word_", "byte_"))
    ]
    return {**document, "schema_version": 1, "metrics": metrics}


def with_student(document: dict, name: str, value: dict) -> dict:
    """Return a copy of results in which the student has this value of one metric."""
    document = copy.deepcopy(document)
    for metric in document["metrics"]:
        if metric["name"] == name:
            metric["values"]["student"] = value
    return document


@pytest.fixture
def compare(converted, cli, tmp_path):
    """Evaluate against an older results.json of this content: compare(content) -> (code, stdout, stderr)."""

    def call(content) -> tuple[int, str, str]:
        older = tmp_path / "older.json"
        older.write_text(content if isinstance(content, str) else json.dumps(content))
        return cli("eval", converted, *TWO_PARTS, "--compare", older, "--json")

    return call


def test_gates_can_stand_in_a_file_with_comments(converted, cli, tmp_path):
    gates, summary = tmp_path / "gates.txt", tmp_path / "summary.md"
    gates.write_text("# for the release\nperplexity@64.ratio<=50  # generous\n\nrecall@8>=0\n")
    code, out, err = cli("eval", converted, *TWO_PARTS, "--gate", gates, "--summary-file", summary, "--json")
    assert code == 0, err
    assert [gate["expression"] for gate in json.loads(out)["gates"]] == ["perplexity@64.ratio<=50", "recall@8>=0"]
    assert "passed 2 gate(s)" in summary.read_text() and "| perplexity@64 ↓ |" in summary.read_text()


def test_the_same_figures_are_no_regression(compare, first_results):
    code, out, _ = compare(first_results)
    assert code == 0 and all(gate["passed"] for gate in json.loads(out)["gates"])


def test_a_worse_figure_than_before_fails(compare, first_results):
    mean = next(m for m in first_results["metrics"] if m["name"] == "perplexity@64")["values"]["student"]["mean"]
    older = with_student(first_results, "perplexity@64", {"mean": mean / 2, "error": 0.01, "n": 4})
    # the first schema has no paired difference that would cancel the change
    code, out, _ = compare({**older, "schema_version": 1})
    assert code == 3 and "perplexity@64 worse than before" in json.loads(out)["verdict"]


@pytest.mark.parametrize(
    ("change", "words"), [({"schema_version": 99}, "schema version 99"), ({"data": {}}, "measured on other data")]
)
def test_results_that_cannot_be_compared_are_refused(compare, first_results, change, words):
    code, _, err = compare({**first_results, **change})
    assert code == 2 and words in err


@pytest.mark.parametrize("version", ["soon", None, [3]])
def test_results_of_no_known_schema_are_refused(compare, first_results, version):
    code, _, err = compare({**first_results, "schema_version": version})
    assert code == 2 and "is not a results.json" in err


def test_another_json_file_is_no_results_json(compare):
    assert "is not a results.json" in compare("{}")[2]


def test_results_of_the_first_schema_are_compared_where_they_mean_the_same(compare, as_first_schema):
    code, out, err = compare(as_first_schema)
    assert code == 0, err
    expressions = [gate["expression"].split()[0] for gate in json.loads(out)["gates"]]
    assert "perplexity@64" in expressions and "recall@40" in expressions and "bits_per_byte@64" not in expressions
    left_out = "not compared, as schema version 1 has them otherwise: bits_per_byte@32, bits_per_byte@64"
    assert left_out in json.loads(out)["notes"]


def test_a_worse_figure_than_in_the_first_schema_fails(compare, as_first_schema):
    code, out, _ = compare(with_student(as_first_schema, "recall@8", {"mean": 2.0, "error": 0.01, "n": 3}))
    assert code == 3 and json.loads(out)["verdict"].startswith("FAILED: recall@8 worse than before")


def test_a_real_file_of_the_first_schema_is_read(converted, cli):
    first = ROOT / "scripts" / "results" / "wikitext-100k.json"
    code, _, err = cli("eval", converted, "--only", "perplexity", "--lengths", "512", "--compare", first)
    assert code == 2 and "was measured on other data" in err


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
    assert code == 0 and "base results read from the cache" in err
    code, _, err = cli("eval", converted, "--only", "tasks", "--tasks", "toyy", "--tasks-dir", tmp_path / "tasks")
    assert code == 2 and "did you mean 'toy'" in err


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
    """Headless Chromium opens the file offline at a phone's width; the verdict and every curve are in the picture."""
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
