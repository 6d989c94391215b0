"""Bad input: one clear error that names the thing, its exit code, and nothing written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def edit_tensors(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def patch_bytes(position: int, value: bytes):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[position : position + len(value)] = value
        path.write_bytes(data)

    return apply


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"x": list(range(500))}))


def duplicate_key(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    first = json.loads(header)
    name = next(key for key in first if key != "__metadata__")
    header = header[:-1] + b"," + json.dumps({name: first[name]}).encode()[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def rename_tensor(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.k_prj.weight"] = tensors.pop("model.layers.0.self_attn.k_proj.weight")


# what is done to a good single-file checkpoint, exit code, what the message must name
SINGLE = {
    "unknown model type": (edit_config(model_type="llamma"), 4, ["llamma", "did you mean 'llama'"]),
    "gpt2": (edit_config(model_type="gpt2"), 4, ["gpt2", "keyword arguments"]),
    "falcon": (edit_config(model_type="falcon"), 4, ["falcon", "attention interface"]),
    "no model type": (lambda f: edit_json(f / "config.json", lambda c: c.pop("model_type")), 4, ["None", "llama"]),
    "already linearized": (edit_config(model_type="linearized_llama"), 4, ["already linearized"]),
    "quantised": (edit_config(quantization_config={"quant_method": "awq"}), 4, ["awq", "floating-point"]),
    "heads that do not divide": (edit_config(num_key_value_heads=4), 1, ["6 query heads", "4 key/value heads"]),
    "no heads": (edit_config(num_key_value_heads=0), 1, ["num_key_value_heads 0"]),
    "config of another type": (lambda f: (f / "config.json").write_text("[]"), 1, ["config.json", "list"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{,"), 1, ["config.json", "not valid JSON"]),
    "config missing": (lambda f: (f / "config.json").unlink(), 1, ["no config.json"]),
    "impossible config": (edit_config(num_hidden_layers="three"), 1, ["config.json", "num_hidden_layers"]),
    "truncated": (truncate, 1, ["model.safetensors", "truncated"]),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), 1, ["too short"]),
    "flipped header length": (patch_bytes(5, b"\xff"), 1, ["damaged or truncated"]),
    "flipped header": (patch_bytes(9, b"\x00"), 1, ["damaged header"]),
    "pickle only": (pickle_only, 1, ["pytorch_model.bin", "never loaded"]),
    "pickle in disguise": (pickle_in_disguise, 1, ["not a safetensors file"]),
    "duplicate key": (duplicate_key, 1, ["duplicate key"]),
    "missing tensor": (
        edit_tensors(lambda t: t.pop("model.norm.weight")), 1, ["1 tensors are missing", "model.norm.weight"],
    ),
    "unexpected tensor": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), 1, ["1 unexpected", "'extra'"]),
    "misnamed tensor": (edit_tensors(rename_tensor), 1, ["missing", "k_proj"]),
    "wrong shape": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)})), 1, ["model.norm.weight", "[7]", "[48]"],
    ),
    "integer weights": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})), 4, ["I8"],
    ),
}  # fmt: skip


def test_missing_weights_are_planned_but_not_converted(base_folder, cli, tmp_path):
    base = base_folder()
    (base / "model.safetensors").unlink()
    code, out, err = cli("convert", base, "-o", tmp_path / "out")
    assert code == 1
    assert_one_line(err, ["no weights"])
    code, out, err = cli("plan", base)
    assert code == 0 and "planned from config.json alone" in out
    code, out, err = cli("plan", base, "--keep-softmax", "recall:25%")
    assert code == 2
    assert_one_line(err, ["needs the base model to be run"])


@pytest.mark.parametrize("case", list(SINGLE))
def test_bad_checkpoint(base_folder, cli, tmp_path, case):
    damage, wanted, words = SINGLE[case]
    base = base_folder()
    damage(base)
    for command in ("convert", "plan"):
        code, out, err = cli(command, base, *(("-o", tmp_path / "out") if command == "convert" else ()))
        assert code == wanted, err
        assert_one_line(err, words)
        assert out == ""
    assert not list(tmp_path.glob("*out*")) and not any((tmp_path / "cwd").iterdir())


def index_outside(folder: Path) -> None:
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder.parent / "elsewhere.safetensors")
    edit_json(
        folder / INDEX,
        lambda index: index["weight_map"].update(
            {k: "../elsewhere.safetensors" for k, v in index["weight_map"].items() if v.startswith("model-00001")}
        ),
    )


def swap_shards(folder: Path) -> None:
    first, second = (folder / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def tensor_in_two_shards(folder: Path) -> None:
    first, second = (folder / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    tensors, other = load_file(first), load_file(second)
    name = next(iter(other))
    save_file({**tensors, name: other[name]}, first, metadata={"format": "pt"})


SHARDED = {
    "missing shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), ["model-00002", "missing"]),
    "index names a file outside": (index_outside, ["../elsewhere.safetensors", "inside the folder"]),
    "mislabelled shards": (swap_shards, ["index places"]),
    "a tensor in two shards": (tensor_in_two_shards, ["model-0000"]),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index missing": (lambda f: (f / INDEX).unlink(), ["neither"]),
}


@pytest.mark.parametrize("case", list(SHARDED))
def test_bad_sharded_checkpoint(base_folder, cli, tmp_path, case):
    damage, words = SHARDED[case]
    base = base_folder(shards=3)
    assert len(list(base.glob("model-*-of-00003.safetensors"))) == 3
    damage(base)
    code, out, err = cli("convert", base, "-o", tmp_path / "out")
    assert code == 1 and out == ""
    assert_one_line(err, words)
    assert not list(tmp_path.glob("*out*"))


OPTIONS = {
    "window 0": (["--window", "0"], ["window", "got 0"]),
    "softmax window 0": (["--softmax-window", "0"], ["softmax_window", "got 0"]),
    "softmax window the shorter one": (
        ["--window", "8", "--softmax-window", "7"],
        ["softmax_window", "got 7", "at least", "8"],
    ),
    "negative sinks": (["--sinks", "-1"], ["sinks", "got -1"]),
    "layer 99": (["--keep-softmax", "99"], ["layer 99", "0 to 2"]),
    "head 7 of 3": (["--keep-softmax", "1:7"], ["head 7", "0 to 2"]),
    "all softmax by layers": (["--keep-softmax", "every:1"], ["nothing to convert"]),
    "unknown mixer": (["--mixer", "gal"], ["gal", "did you mean 'gla'"]),
    "unknown mix": (["--mix", "outsid"], ["mix", "outsid", "outside"]),
    "unknown key": (["--set", "windw=3"], ["windw", "did you mean 'window'"]),
    "unknown nested key": (["--set", "mix_options.log_mas=3"], ["mix_options.log_mas", "did you mean 'log_mass'"]),
    "joint for signed weights": (["--mixer", "kda", "--mix", "joint"], ["kda", "joint", "sum, outside"]),
    "gate of the gateless": (["--mixer", "linear", "--set", "gate=learned"], ["gate", "linear", "allowed is key"]),
    "unknown feature map": (
        ["--mixer", "linear", "--set", "mixer_options.feature_map=elo"],
        ["feature_map", "'elo'", "did you mean 'elu'"],
    ),
    "no slots": (["--mixer", "t2r", "--set", "mixer_options.features=0"], ["features", "got 0", "above 0"]),
    "gate of gateless memories": (
        ["--mixer", "mom", "--set", "mixer_options.inner=linear", "--set", "gate=learned"],
        ["gate", "mom", "allowed is key"],
    ),
    "too many routes": (["--mixer", "mom", "--set", "mixer_options.top=9"], ["top", "got 9", "at most memories, 4"]),
    "layer twice": (["--set", "layers={'0-1': {window: 3}, '1': {window: 4}}"], ["layers.1", "already in '0-1'"]),
    "layer beyond": (["--set", "layers={'7': {window: 3}}"], ["layer 7", "0 to 2"]),
    "layer nonsense": (["--set", "layers={last: {window: 3}}"], ["layers.last", "0-3,7"]),
    "layer key": (["--set", "layers={'1': {windw: 3}}"], ["layers.1.windw", "did you mean 'window'"]),
    "layer mixer": (["--set", "layers={'1': {mixer: kdaa}}"], ["layers.1.mixer", "did you mean 'kda'"]),
    "malformed set": (["--set", "window"], ["key=value"]),
    "unknown config": (["--config", "ligr"], ["ligr", "did you mean 'liger'"]),
    "no config file": (["--config", "missing.yaml"], ["missing.yaml"]),
    "unknown link": (["--link", "soft"], ["--link", "soft", "hard"]),
    "unknown option": (["--widnow", "3"], ["--widnow"]),
}


@pytest.mark.parametrize("case", list(OPTIONS))
def test_bad_option(base_folder, cli, tmp_path, case):
    options, words = OPTIONS[case]
    code, out, err = cli("convert", base_folder(), "-o", tmp_path / "out", *options)
    assert code == (1 if case == "all softmax by layers" else 2), err
    assert_one_line(err, words)
    assert out == "" and not list(tmp_path.glob("*out*"))


def test_all_problems_of_a_file_at_once(base_folder, cli, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("windoww: 3\nsinks: many\nmix: both\nmix_options: {x: 1}\n")
    code, _, err = cli("convert", base_folder(), "--config", path)
    assert code == 2
    for word in ("bad.yaml", "windoww", "did you mean 'window'", "sinks", "'many'", "mix", "'both'"):
        assert word in err
    path.write_text("a: [")
    code, _, err = cli("convert", base_folder(name="other"), "--config", path)
    assert code == 2 and "not valid YAML" in err


@pytest.mark.parametrize(
    ("model", "wanted", "words"),
    [
        ("./nowhere", 2, ["./nowhere"]),
        ("missing.gguf", 2, ["missing.gguf"]),
        ("a b c", 2, ["a b c"]),
    ],
)
def test_no_such_model(cli, model, wanted, words):
    code, out, err = cli("convert", model)
    assert code == wanted and out == ""
    assert_one_line(err, words)


def test_a_hub_that_does_not_answer(cli, monkeypatch):
    """Quickly, and saying so: an address that refuses, and one that never answers a name look-up."""
    import time

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    code, out, err = cli("convert", "nobody/nothing")
    assert code == 1 and out == "" and time.monotonic() - started < 20
    assert_one_line(err, ["nobody/nothing", "hub did not answer"])


def test_damaged_gguf(cli, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a gguf file")
    code, _, err = cli("convert", path)
    assert code == 1
    assert_one_line(err, ["not a GGUF file"])


def test_no_permission(base_folder, cli, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal of the system is simulated."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    base = base_folder()
    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = cli("convert", base, "-o", tmp_path / "sub" / "out")
    assert code == 2
    assert_one_line(err, ["no permission", "sub"])


@pytest.mark.parametrize("link", ["copy", "auto"])
def test_no_disk_space(base_folder, cli, tmp_path, monkeypatch, link):
    import errno

    base = base_folder()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if link == "copy":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr("os.link", full)
        monkeypatch.setattr("shutil.copyfile", full)
    code, _, err = cli("convert", base, "-o", tmp_path / "out", "--link", link, "--keep-softmax", "none")
    assert code == 5, err
    assert_one_line(err, ["disk"])
    assert not list(tmp_path.glob("*out*"))


def test_out_exists(base_folder, cli, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("x")
    code, _, err = cli("convert", base_folder(), "-o", out)
    assert code == 2
    assert_one_line(err, ["out exists", "--overwrite"])
    (tmp_path / "plain").write_text("x")
    code, _, err = cli("convert", base_folder(name="b2"), "-o", tmp_path / "plain")
    assert code == 2 and "not a folder" in err


def test_failures_in_json(base_folder, cli):
    base = base_folder()
    edit_config(model_type="gpt2")(base)
    for arguments, wanted in ((("convert", base), 4), (("convert",), 2), (("nonsense",), 2)):
        code, out, _ = cli(*arguments, "--json")
        assert code == wanted
        document = json.loads(out)
        assert document["exit_code"] == wanted and document["error"]


def assert_one_line(err: str, words: list[str]) -> None:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], lines[0]
