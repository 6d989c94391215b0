"""Baselines on request, models that take turns in memory, answers by letter, generation tasks."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import SUITE, quiet, tiny_base

from linearize.errors import ConfigError
from linearize.evaluation import choice
from linearize.evaluation.suite import Suite
from linearize.modeling import loading
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert
from linearize.workflows.evaluate import evaluate

WINDOWED = {"window": 12, "sinks": 2}
LETTERS = Suite(lengths=(), recall=())


def make(base, out, keep_softmax: str):
    settings = load_config(
        None, {**WINDOWED, "keep_softmax": keep_softmax}, ["mix_options.log_mass=0.0", "calibration.when=never"]
    )
    convert(str(base), settings, out=out, verify=False, progress=quiet)
    return out


@pytest.fixture
def student(base_folder, tmp_path):
    return make(base_folder(), tmp_path / "linearized" / "tiny", "1:0,1:2,2:1")


def test_models_in_turn_give_the_figures_of_models_together(student, monkeypatch, tmp_path):
    suite = replace(SUITE, passkey=(60,), generation=4, branch=True, uniform=True)
    together = evaluate(student, suite, hold="together", progress=quiet)
    assert not together.notes
    alive, loads = [], []

    def watched(load):
        def loaded(*arguments, **keywords):
            assert not [model for model in alive if model() is not None], "two sets of weights in memory at once"
            model = load(*arguments, **keywords)
            alive.append(weakref.ref(model))
            loads.append(load.__name__)
            return model

        return loaded

    for name in ("load_student", "load_unconverted"):
        monkeypatch.setattr(loading, name, watched(getattr(loading, name)))
    out = tmp_path / "report"
    in_turn = evaluate(student, suite, hold="in-turn", out=out, progress=quiet)
    assert in_turn.metrics == together.metrics and in_turn.positions == together.positions
    assert in_turn.tables["samples"] == together.tables["samples"]
    assert {"load_student", "load_unconverted"} == set(loads) and len(loads) > 3
    assert "took turns in memory" in in_turn.notes[0] and "waited on disk" in (out / "report.md").read_text()


@pytest.mark.parametrize(("free", "turns"), [(0, True), (2**40, False)])
def test_memory_decides_whether_models_take_turns(student, monkeypatch, free, turns):
    monkeypatch.setattr("linearize.device.available_memory", lambda device: free)
    results = evaluate(student, replace(SUITE, lengths=(32,), recall=(), max_tokens=64), progress=quiet)
    assert any("took turns" in line for line in results.notes) == turns


def test_the_uniform_layout_and_the_control_are_columns(in_float32, student, tmp_path, cli):
    base = tmp_path / "base"
    control = make(base, tmp_path / "linearized" / "control", "all")
    flags = ["--recipe", "lora", "--tokens", "64", "--seq-len", "32", "--set", "lora.rank=2", "--set", "lora.alpha=64"]
    # with the base's own logits as targets a control stays the base; with the next token it learns as the student does
    flags += ["--set", "loss.kind=ce", "--set", "optimizer.lr=0.05"]
    code, _, err = cli("finetune", control, *flags, "-o", tmp_path / "tuned")
    assert code == 0, err
    suite = replace(SUITE, recall=(8,), lengths=(64,), uniform=True, control=str(tmp_path / "tuned"))
    results = evaluate(student, suite, out=tmp_path / "report", progress=quiet)
    even = make(base, tmp_path / "linearized" / "even", "0:0,1:0,2:0")
    for found, alone in (("uniform", even), ("control", tmp_path / "tuned")):
        itself = evaluate(alone, replace(SUITE, recall=(8,), lengths=(64,)), progress=quiet)
        for name in ("perplexity@64", "kl@64", "recall@8"):
            wanted = itself.metric(name).values["student"].mean
            assert results.metric(name).values[found].mean == pytest.approx(wanted, rel=1e-5)
    values = {name: value.mean for name, value in results.metric("perplexity@64").values.items()}
    assert len({values[name] for name in ("base", "student", "uniform", "control")}) == 4
    for text in ((tmp_path / "report" / name).read_text() for name in ("report.md", "report.html")):
        assert "uniform layout, untrained" in text and "control: base, same recipe" in text


def test_the_uniform_layout_of_a_calibrated_student(in_float32, base_folder, tmp_path):
    out, even = tmp_path / "linearized" / "fitted", tmp_path / "linearized" / "even"
    base = str(base_folder())
    for folder, keep in ((out, "1:0,1:2,2:1"), (even, "0:0,1:0,2:0")):
        convert(base, load_config(None, {**WINDOWED, "keep_softmax": keep}), out=folder, verify=False, progress=quiet)
    suite = replace(SUITE, recall=(), lengths=(64,))
    value = evaluate(out, replace(suite, uniform=True), progress=quiet).metric("kl@64").values["uniform"].mean
    wanted = evaluate(even, suite, progress=quiet).metric("kl@64").values["student"].mean
    assert value == pytest.approx(wanted, rel=1e-4) and value > 0


def test_baselines_that_would_say_nothing_are_refused(student, base_folder, tmp_path, cli):
    linear = make(tmp_path / "base", tmp_path / "linearized" / "linear", "none")
    code, _, err = cli("eval", linear, "--only", "recall", "--recall", "8", "--uniform")
    assert code == 2 and "nothing to spread" in err
    code, _, err = cli("eval", student, "--only", "recall", "--recall", "8", "--control", linear)
    assert code == 2 and "has 9 linear heads" in err and "--keep-softmax all" in err
    other = make(base_folder("mqa_tied", name="other"), tmp_path / "linearized" / "other", "all")
    code, _, err = cli("eval", student, "--only", "recall", "--recall", "8", "--control", other)
    assert code == 2 and "comes from another base (other)" in err


def write_items(path):
    rows = [
        {"query": f"Which is {word}?", "choices": [f"{word} {i}" for i in range(2 + number % 3)], "gold": number % 2}
        for number, word in enumerate(["red", "green", "blue", "heavy", "light", "old"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_letters_equal_a_plain_computation(student, tmp_path):
    path = write_items(tmp_path / "toy set.jsonl")
    results = evaluate(student, replace(LETTERS, choice=(str(path),)), out=tmp_path / "report", progress=quiet)
    tokenizer, model = loading.load_tokenizer(student), tiny_base()
    right, consistent, chosen = [], [], []
    for item in choice.read_items(path, None):
        count, drawn = len(item.choices), []
        for rotation in range(count):
            order = [*range(rotation, count), *range(rotation)]
            lines = [f"{'ABCD'[i]}. {item.choices[option]}" for i, option in enumerate(order)]
            text = choice.INSTRUCTION + "\n".join([item.query, *lines]) + "\nAnswer:"
            scores = []
            for letter in "ABCD"[:count]:
                ids = torch.tensor([tokenizer(f"{text} {letter}").input_ids])
                with torch.no_grad():
                    scores.append(model(ids[:, :-1]).logits[0, -1, ids[0, -1]].item())
            chosen.append(scores.index(max(scores)))
            drawn.append(order[chosen[-1]])
        right.append(sum(option == item.gold for option in drawn) / count)
        consistent.append(float(len(set(drawn)) == 1))
    metric = results.metric("letters_toy_set")
    assert metric.values["base"].mean == pytest.approx(sum(right) / 6) and metric.values["base"].n == 6
    assert metric.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3) and "toy set.jsonl" in metric.data
    assert results.metric("letters_consistent_toy_set").values["base"].mean == sum(consistent) / 6
    table = results.tables["letters@toy_set"]
    assert [row["base"] for row in table] == [pytest.approx(chosen.count(i) / 18) for i in range(4)]
    assert [row["right"] for row in table] == [pytest.approx(n / 18) for n in (6, 6, 4, 2)]
    for key in ("right", "base", "student", "window"):
        assert sum(row[key] for row in table) == pytest.approx(1)
    assert "## Letters chosen: toy_set" in (tmp_path / "report" / "report.md").read_text()
    assert 'id="letters-toy_set"' in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "plots" / "letters-toy_set.png").is_file()


def test_a_habit_of_a_letter_shows(student, tmp_path, monkeypatch):
    rows = [{"query": "?", "choices": ["w", "x", "y", "z"], "gold": i % 4} for i in range(8)]
    (tmp_path / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(choice, "_likeliest_letters", lambda context, name, model, rows, letter_ids: [1] * len(rows))
    results = evaluate(student, replace(LETTERS, choice=(str(tmp_path / "four.jsonl"),)), progress=quiet)
    assert [row["student"] for row in results.tables["letters@four"]] == [0, 1, 0, 0]
    assert [row["right"] for row in results.tables["letters@four"]] == [0.25] * 4
    metric = results.metric("letters_four")
    assert metric.values["student"].mean == metric.chance == 0.25 and metric.values["student"].error == 0
    assert metric.recovery_over_chance is None
    assert results.metric("letters_consistent_four").values["student"].mean == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no items"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "1 choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold 2"),
        ('{"question": "a"}', "line 1"),
        ('{"query": "a", "choices": "yes", "gold": 0}', "choices (a list)"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1.0}', "gold (a whole number)"),
        ("nonsense", "line 1"),
    ],
)
def test_files_of_items_with_mistakes(student, cli, tmp_path, text, words):
    (tmp_path / "bad.jsonl").write_text(text)
    code, _, err = cli("eval", student, "--only", "choice", "--choice", tmp_path / "bad.jsonl")
    assert code == 2 and "--choice" in err and words in err
    (tmp_path / "line.jsonl").write_text('{"query": "a\u2028b", "choices": ["b", "c"], "gold": 0}', encoding="utf-8")
    assert choice.read_items(tmp_path / "line.jsonl", None)[0].query == "a\u2028b"
    with pytest.raises(ConfigError, match="no text file"):
        choice.read_items(tmp_path / "missing.jsonl", None)


GENERATION_TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (.*)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter: [{{function: regex, regex_pattern: "(.*)", group_select: -1}}, {{function: take_first}}]
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'linearize[tasks]')")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_generation_tasks_are_scored_by_every_reading(harness, student, cli, tmp_path):
    """Half of the items have the base's own answer as the right one.

    So the base scores exactly a half where answers are read as they stand, and nothing where they have to follow ####.
    """
    tokenizer, model = loading.load_tokenizer(student), tiny_base()
    rows = []
    for i in range(4):
        ids = tokenizer(f"Question: {i} and {i}\nAnswer:", return_tensors="pt").input_ids
        with torch.no_grad():
            said = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True).partition("Question:")[0]
        matches = [line for line in text.split("\n")]
        rows.append({"question": f"{i} and {i}", "answer": matches[-1].strip() if i % 2 else "something else"})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = GENERATION_TASK.format(data=json.dumps(str(tmp_path / "sums.jsonl")))
    (tmp_path / "tasks" / "sums.yaml").write_text(task)
    flags = ["--only", "tasks", "--tasks", "sums", "--tasks-dir", tmp_path / "tasks", "--json"]
    code, out, err = cli("eval", student, *flags, "--gate", "sums_exact_match_strict_match>=0")
    assert code == 0, err
    metrics = {metric["name"]: metric for metric in json.loads(out)["metrics"]}
    assert set(metrics) == {"sums_exact_match_strict_match", "sums_exact_match_flexible_extract"}
    for metric in metrics.values():
        assert {value["n"] for value in metric["values"].values()} == {4} and metric["data"].startswith("sums ")
    assert metrics["sums_exact_match_strict_match"]["values"]["base"]["mean"] == 0


def test_the_answers_of_a_base_are_those_of_its_tokenizer(harness, student, cli, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"question": "1", "answer": "2"}\n' * 2)
    (tmp_path / "tasks").mkdir()
    task = GENERATION_TASK.format(data=json.dumps(str(tmp_path / "sums.jsonl")))
    (tmp_path / "tasks" / "sums.yaml").write_text(task)
    flags = ["--only", "tasks", "--tasks", "sums", "--tasks-dir", tmp_path / "tasks"]
    said = "base results read from the cache"
    assert [said in cli("eval", student, *flags, "-o", tmp_path / name)[2] for name in "ab"] == [False, True]
    for folder in (student, tmp_path / "base"):
        rules = json.loads((folder / "tokenizer.json").read_bytes())
        start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        rules["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(rules))
    assert loading.load_tokenizer(student)("a").input_ids[0] == 0
    assert said not in cli("eval", student, *flags, "-o", tmp_path / "c")[2]
    (tmp_path / "tasks" / "sums.yaml").write_text(task.replace("exact_match", "bleu").partition("filter_list")[0])
    code, _, err = cli("eval", student, *flags)
    assert code == 2 and "scores none of acc" in err


def test_tasks_that_need_a_hub_fail_at_once_without_one(harness, student, cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(loading, "load_student", None)
    (tmp_path / "tasks").mkdir()
    task = GENERATION_TASK.format(data="x").replace("dataset_path: json", "dataset_path: openai/gsm8k")
    (tmp_path / "tasks" / "sums.yaml").write_text(task)
    code, out, err = cli("eval", student, "--only", "tasks", "--tasks", "sums", "--tasks-dir", tmp_path / "tasks")
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert "the data of sums are not on this machine" in err and "--tasks-dir" in err
