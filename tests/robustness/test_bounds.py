"""Inputs without bound: each has a limit, and one line that says so."""

import gzip
import json
import os
import struct

import pytest
from transformers import AutoTokenizer

from linearize.checkpoint.auto import auto_tokenizer
from linearize.checkpoint.gguf_header import check_gguf_header
from linearize.checkpoint.json_file import read_json
from linearize.data import documents, text_files
from linearize.data.documents import ChatError, chat_text, open_dataset
from linearize.errors import CheckpointError, ConfigError
from linearize.settings.yaml_file import YAML_LIMIT, read_yaml


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_one_line_of_text_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_TEXT", 1000)
    text = "word " * 5000
    for name, content in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        pieces = [row["text"] for row in open_dataset(str(tmp_path / name))]
        assert "".join(pieces) == text and max(map(len, pieces)) <= 2000


def test_rows_of_json_have_a_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_ROW", 100)
    monkeypatch.setattr(text_files, "LONGEST_ARRAY", 300)
    rows = [{"text": "short"}, {"text": "x" * 200}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="row 1 is longer than"):
        list(text_files.json_rows(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 40}] * 10))
    with pytest.raises(ValueError, match="one JSON array of more than"):
        list(text_files.json_rows(str(tmp_path / "a.json")))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x" * 40}] * 3, indent=1))
    assert len(list(text_files.json_rows(str(tmp_path / "b.json")))) == 3
    (tmp_path / "c.json").write_text(json.dumps({"text": "one"}, indent=1))
    assert list(text_files.json_rows(str(tmp_path / "c.json"))) == [{"text": "one"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 400 + b"}", "400 digits"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_has_a_depth_a_width_and_one_encoding(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**9), ("num_labels", 10**7), ("vocab_size", 10**12), ("bos_token_id", 10**6),
     ("pad_token_id", 320), ("hidden_size", "64"), ("rope_theta", 10**25), ("num_attention_heads", -1)],
)  # fmt: skip
def test_counts_that_no_model_has(base_folder, cli, tmp_path, name, value):
    base = base_folder()
    change(base / "config.json", **{name: value})
    code, _, err = cli("convert", base, "-o", tmp_path / "out", "--window", "12", "--keep-softmax", "none")
    assert code == 1 and name in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("tensors", "keys", "message"), [(2**60, 1, "a count of"), (1, 2**60, "a count of"), (1, 1, "asked for|a count")]
)
def test_counts_of_a_gguf_file(tmp_path, tensors, keys, message):
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)
    header += struct.pack("<Q", 4) + b"name" + struct.pack("<IIQ", 9, 8, 2**50)
    (tmp_path / "m.gguf").write_bytes(header)
    with pytest.raises(CheckpointError, match=message):
        check_gguf_header(tmp_path / "m.gguf")


def test_a_tokenizer_that_blows_text_up(tokenizer_folder, tmp_path):
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    change(tmp_path / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 40})
    with pytest.raises(CheckpointError, match="times as long"):
        auto_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{{ 'a' * 100000000000 }}",
        "{{ 'a' * 20000000 }}",
        "{{ raise_exception('\x1b[31m' + 'no' * 9999) }}",
    ],
)
def test_a_chat_template_that_does_not_end(tokenizer_folder, monkeypatch, template):
    monkeypatch.setattr(documents, "TEMPLATE_SECONDS", 0.5)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = template
    with pytest.raises(ChatError) as error:
        chat_text(tokenizer, [{"role": "user", "content": "hello"}])
    assert len(str(error.value)) < 600


def test_yaml_has_a_size_and_a_depth(tmp_path):
    path = tmp_path / "a.yaml"
    for content, message in (("a: 1\n" * YAML_LIMIT, "bytes of YAML"), ("[" * 3000 + "]" * 3000, "too deeply")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)


ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    "text",
    ["window: !!map [1]", "window: !!bool foo", "window: !!int ''", "description: 2020-99-99", "window: " + "9" * 5000,
     "layers: &a {x: *a}", "&a [*a]", f"a0: &a0 [x]\n{ALIASES}", f"a0: &a0 {{x: 1}}\n{MERGES}", 'mixer: "\\ud800"',
     "window: !!timestamp foo", "a: {b: " * 2000, "- a", "0", "mixer: !!python/object/apply:os.system [touch RAN]"],
)  # fmt: skip
def test_odd_yaml_is_refused_in_one_line(base_folder, cli, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    base = base_folder()
    for flags in (("--config", tmp_path / "c.yaml"), ("--set", f"layers={text.partition(': ')[2] or text}")):
        code, _, err = cli("plan", base, *flags)
        assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and len(err) < 2200, err
    assert not os.path.exists("RAN")


@pytest.mark.parametrize("option", ["--summary-file", "--log-file", "--base", "--data", "--compare", "--gate"])
def test_a_pipe_is_no_file(one_conversion, cli, tmp_path, option):
    os.mkfifo(tmp_path / "pipe.txt")
    code, _, err = cli(
        "eval", one_conversion, "--only", "parity", option, tmp_path / "pipe.txt", "-o", tmp_path / "out"
    )
    assert code == 2 and "error: " in err, err


def test_a_full_log_ends_no_command(cli):
    code, _, err = cli("list", "mixers", "--log-file", "/dev/full")
    assert code == 0, err
    code, _, err = cli("convert", "nowhere-at-all", "--log-file", "/dev/full")
    assert code in (1, 2) and "error: " in err


def test_older_results_are_a_plain_file(one_conversion, cli, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        code, _, err = cli("eval", one_conversion, "--only", "parity", "--compare", path, "-o", tmp_path / "out")
        assert code == 2 and "no plain file" in err, err


def test_tokens_that_the_model_has_no_embedding_for(base_folder, cli, tmp_path):
    base = base_folder(vocab_size=200)
    code, _, err = cli("convert", base, "-o", tmp_path / "out", "--window", "12", "--keep-softmax", "none")
    assert code == 1 and "the model has 200" in err, err
