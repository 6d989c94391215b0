"""Words of a model's files reach terminals, cards and pages as plain text; typos and odd inputs end in one line."""

import json
import os
import socket

import pytest
import torch
import yaml
from helpers import quiet, tiny_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from linearize.checkpoint.student import Student
from linearize.errors import message_line
from linearize.modeling.loading import load_student
from linearize.report.card import BEGIN, END, add_evaluation, conversion_card
from linearize.report.markdown import plain
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert

FLAGS = ("--window", "12", "--keep-softmax", "none", "--no-calibrate")


def plainly(base, out, **options):
    settings = load_config(None, {"window": 12, "keep_softmax": "none"}, ["calibration.when=never"])
    messages = []
    student = convert(str(base), settings, out=out, progress=messages.append, **{"verify": False, **options})
    return student, messages


@pytest.mark.parametrize(
    "name", ["my--model", "a..b", "x" * 97, "owner/" + "y" * 100, "a b", "owner/na me", "-x-", "x" * 5000]
)
def test_names_that_no_hub_has(cli, name):
    code, _, err = cli("convert", *(("--",) if name.startswith("-") else ()), name)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err


def test_messages_are_one_printable_line():
    assert message_line("a\x1b[31m\nb\0\u202e") == "a\\u001b[31m; b\\u0000\\u202e"
    assert len(message_line("x" * 10**6)) < 2100


def test_a_shard_s_name_cannot_forge_a_line(base_folder, cli, tmp_path):
    base = base_folder(shards=2)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    forged = "x\nerror: nothing\x1b[2K.safetensors"
    index["weight_map"] = dict.fromkeys(index["weight_map"], forged)
    path.write_text(json.dumps(index))
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *FLAGS)
    assert code == 1 and err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize("name", ["co: lon", "[x](http://y)", "<script>alert(1)</script>", "a|b", "# title", "- x"])
def test_a_card_says_a_name_as_it_is(base_folder, tmp_path, name):
    base = base_folder(name=name.replace("/", "∕"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: evil\n")
    card = (plainly(base, tmp_path / "out")[0].folder / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["base_model"] == base.name and yaml.safe_load(front)["license"] == "apache-2.0"
    assert "<script>" not in body and "\n# [x]" not in body and f"# {plain(base.name)}, linearized" in body


class Verdict:
    """Stands for results."""

    verdict, model, metrics, data = "passed", "m", (), {"text": "t"}


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr("linearize.report.card.summary_table", lambda results: "| table |")


@pytest.mark.parametrize(
    "content", [b"", b"---\n- a\n---\ntext", b"---\na: [\n---\n", b"\xff\xfe---", b"---\n1\n---\n"]
)
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path, without_figures, content):
    (tmp_path / "README.md").write_bytes(content)
    assert "is left alone" in add_evaluation(tmp_path / "README.md", Verdict)
    assert (tmp_path / "README.md").read_bytes() == content


@pytest.mark.parametrize("end", [END + "\n", END, END + "\r\n", ""])
def test_nothing_behind_our_section_is_lost(tmp_path, without_figures, end):
    card = tmp_path / "README.md"
    card.write_text(f"---\na: 1\n---\nbefore\n{BEGIN}\nold\n{end}after\n", newline="")
    assert add_evaluation(card, Verdict) is None
    text = card.read_text()
    assert "before" in text and "after" in text and text.count("Verdict: passed") == 1
    assert yaml.safe_load(text.split("---")[1])["a"] == 1


def test_a_head_that_differs_from_the_embedding_it_is_tied_to(base_folder, tmp_path):
    base = base_folder("mqa_tied")
    tensors = load_file(base / "model.safetensors")
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, base / "model.safetensors", metadata={"format": "pt"})
    assert not any("differs from" in message for message in plainly(base, tmp_path / "same")[1])
    save_file({**same, "lm_head.weight": same["lm_head.weight"] * 2}, base / "model.safetensors", {"format": "pt"})
    student, messages = plainly(base, tmp_path / "out", verify=True)
    assert any("'lm_head.weight' differs from the embedding" in message for message in messages)
    head = load_student(student.folder, dtype=torch.float32).get_output_embeddings().weight
    assert torch.equal(head, same["lm_head.weight"] * 2)


def test_layers_that_predict_further_tokens_are_kept(base_folder, cli, tmp_path):
    base = base_folder()
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    count = config["num_hidden_layers"]
    extra = {f"model.layers.{count}.eh_proj.weight": torch.randn(4, 4)}
    save_file({**tensors, **extra}, base / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("convert", base, "-o", tmp_path / "no", *FLAGS)
    assert code == 1 and "--ignore-unexpected" in err and "did you mean" not in err
    for name, flags in (("flag", ("--ignore-unexpected",)), ("config", ())):
        if name == "config":
            (base / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
        code, _, err = cli("convert", base, "-o", tmp_path / name, *FLAGS, *flags)
        assert code == 0, err
        kept = {}
        for path in (tmp_path / name).glob("*.safetensors"):
            kept |= load_file(path)
        (tensor,) = extra
        assert torch.equal(kept[tensor], extra[tensor])
        assert Student.read(tmp_path / name).manifest.ignored_tensors == (tensor,)
        load_student(tmp_path / name, dtype=torch.float32)


def test_an_adapter_of_a_resized_vocabulary(base_folder, tmp_path):
    base, model = base_folder(), tiny_base()
    size = model.config.vocab_size + 8
    model.resize_token_embeddings(size, mean_resizing=False)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    student, _ = plainly(tmp_path / "a", tmp_path / "out", merge_adapter=True)
    merged = load_student(student.folder, dtype=torch.float32)
    assert merged.get_input_embeddings().weight.shape[0] == size
    expected = adapted.get_base_model().get_input_embeddings().modules_to_save["default"].weight
    assert torch.equal(merged.get_input_embeddings().weight, expected)


def test_home_is_expanded_in_quotes(base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    base_folder()
    assert cli("convert", "~/base", "-o", "~/out", *FLAGS, "--no-verify")[0] == 0
    assert (tmp_path / "out/linearize.json").is_file() and not os.path.exists("~")
    (tmp_path / "p.yaml").write_text("{model: '~/base', out: '', convert: {window: 12}}")
    code, _, err = cli("run", "~/p.yaml")
    assert code == 2 and "out" in err and not os.listdir(".")


def test_a_failure_leaves_no_new_folders(base_folder, cli, tmp_path):
    base = base_folder()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    assert cli("convert", base, "-o", tmp_path / "a/b/c/out", *FLAGS)[0] == 1
    assert not (tmp_path / "a").exists()


def test_a_local_folder_asks_no_network(base_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda self, address: asked.append(address) or 1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments) or [])
    settings = load_config(None, {"window": 12, "keep_softmax": "none"})
    convert(str(base_folder()), settings, out=tmp_path / "out", verify=False, progress=quiet)
    assert asked == []


def test_a_card_of_a_record_with_odd_words(one_conversion):
    document = Student.read(one_conversion).manifest.to_dict()
    document["base"] |= {"name": "a\x1b[31m: [b]", "kind": "hub", "reference": "o/w n"}
    card = conversion_card(type(Student.read(one_conversion).manifest).from_document(document), one_conversion)
    assert "\x1b" not in card and "](https://huggingface.co/o/w%20n)" in card
