"""Conversion: what is written, how, and that nothing half-written stays."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import SHAPES, quiet, write_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.checkpoint.source import Source, local_fingerprint
from linearize.checkpoint.student import Student
from linearize.checkpoint.weights import read_weights
from linearize.checkpoint.work_folder import alone_in, claim
from linearize.conversion import verify
from linearize.errors import CheckpointError, ConfigError
from linearize.modeling.loading import load_student
from linearize.modeling.window_cache import WindowCache
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert


def settings(**flags):
    return load_config(None, {"window": 8, "sinks": 2, **flags})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Checkpoint:
    """A conversion, its base, and what it was asked for."""

    base: Path
    out: Path
    shape: str
    mix: str
    shards: int
    student: Student


@pytest.fixture(
    scope="module",
    params=[(shape, *case) for shape in SHAPES for case in (("outside", 1), ("outside", 3), ("sum", 1))],
    ids=lambda case: "-".join(map(str, case)),
)
def checkpoint(request, tmp_path_factory, tokenizer_folder):
    """Convert a model of every shape once, from one file and from three, with and without added parameters."""
    shape, mix, shards = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    base = write_base(folder / "base", tokenizer_folder, shape, shards=shards, dtype=torch.bfloat16)
    student = convert(str(base), settings(mix=mix), out=folder / "out", verify=False, progress=quiet)
    return Checkpoint(base, folder / "out", shape, mix, shards, student)


def test_every_head_of_every_layer_is_converted(checkpoint):
    heads = 3 * SHAPES[checkpoint.shape]["num_key_value_heads"]
    assert checkpoint.student.manifest.coverage.model_dump() == {
        "layers": 3, "layers_planned": 3, "heads": heads, "heads_planned": heads, "layers_converted": 3,
        "heads_converted": heads,
    }  # fmt: skip


def test_base_tensors_keep_their_names_and_bytes(checkpoint):
    before, after = read_weights(checkpoint.base), read_weights(checkpoint.out)
    for name in before.tensors:
        with (
            safe_open(checkpoint.base / before.tensors[name].file, "pt") as a,
            safe_open(checkpoint.out / after.tensors[name].file, "pt") as b,
        ):
            assert torch.equal(a.get_tensor(name), b.get_tensor(name))


def test_only_the_mix_s_parameters_are_added(checkpoint):
    added = read_weights(checkpoint.out).tensors.keys() - read_weights(checkpoint.base).tensors.keys()
    masses = {f"model.layers.{i}.self_attn.mixer.log_mass" for i in range(3)}
    assert added == (masses if checkpoint.mix == "outside" else set())


def test_a_single_file_stays_single_where_nothing_is_added(checkpoint):
    single = (checkpoint.out / "model.safetensors").is_file()
    assert single == (checkpoint.mix == "sum" and checkpoint.shards == 1)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"]
)
def test_files_beside_the_weights_are_copied(checkpoint, name):
    assert digest(checkpoint.out / name) == digest(checkpoint.base / name)


def test_the_manifest_holds_the_checksum_of_every_file(checkpoint):
    checksums = json.loads((checkpoint.out / "linearize.json").read_bytes())["sha256"]
    assert "config.json" in checksums
    assert {name: digest(checkpoint.out / name) for name in checksums} == checksums


def test_the_manifest_holds_the_settings(checkpoint):
    assert json.loads((checkpoint.out / "linearize.json").read_bytes())["settings"]["mix"] == checkpoint.mix


def test_the_config_changes_in_what_names_the_model_alone(checkpoint):
    config, original = (json.loads((path / "config.json").read_bytes()) for path in (checkpoint.out, checkpoint.base))
    changed = {key for key in config.keys() | original.keys() if config.get(key) != original.get(key)}
    assert changed == {"model_type", "architectures", "auto_map", "linearize"}


def test_the_card_names_base_and_mix(checkpoint):
    card = (checkpoint.out / "README.md").read_text()
    assert "base_model: base" in card and f"mixed by `{checkpoint.mix}`" in card
    assert "Base weights are unchanged" in card


def test_a_checkpoint_loads_and_generates_from_its_chat_template(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=20, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.verifies_apart
def test_verification_passes_and_records_zero(base_folder, tmp_path):
    student = convert(str(base_folder()), settings(keep_softmax="1:2"), out=tmp_path / "out", progress=quiet)
    check = student.manifest.verification
    assert check.softmax_everywhere_max_difference == 0.0
    assert 0 <= check.cached_decode_max_difference < 1e-5


@pytest.mark.verifies_apart
def test_verification_fails_on_weights_that_are_not_finite(base_folder, tmp_path):
    """One flipped exponent bit is enough, and nothing is left behind."""
    base = base_folder()
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\x80\x7f"  # an infinity in the last tensor
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not finite"):
        convert(str(base), settings(), out=tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_verification_fails_when_decode_differs(base_folder, tmp_path, monkeypatch):
    """A check that cannot fail is no check: simulate a cache that loses its recurrent state."""
    out, base = tmp_path / "out", base_folder()
    convert(str(base), settings(), out=out, verify=False, progress=quiet)
    # only a branch that matters can show a lost state
    added = out / "model-00002-of-00002.safetensors"
    tensors = {name: torch.full_like(value, 2.0) for name, value in load_file(added).items()}
    save_file(tensors, added, metadata={"format": "pt"})
    extend = WindowCache.extend

    def extend_and_forget(self, *arguments):
        context = extend(self, *arguments)
        self.recurrent_state = None
        return context

    monkeypatch.setattr(WindowCache, "extend", extend_and_forget)
    with pytest.raises(verify.VerificationFailure, match="cached decode differs"):
        verify.verify(out, base)


@pytest.mark.parametrize("mixer", ["gla", "vq"])
def test_a_large_model_is_verified_layer_by_layer(base_folder, tmp_path, monkeypatch, mixer):
    out, base = tmp_path / "out", base_folder("mqa_tied", shards=2, dtype=torch.bfloat16)
    convert(str(base), settings(mixer=mixer), out=out, verify=False, progress=quiet)
    monkeypatch.setattr(verify, "RESIDENT_BYTES", 0)
    assert verify.verify(out, base)["softmax_everywhere_max_difference"] == 0.0


def test_a_config_may_be_a_file_or_a_name(base_folder, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{window: 12, sinks: 2, keep_softmax: none, calibration: {when: never}}")
    student = convert(base_folder(), file, out=tmp_path / "out", verify=False, progress=quiet)
    assert student.manifest.settings.window == 12 and student == Student.read(tmp_path / "out")
    with pytest.raises(ConfigError, match="--config: got 'no-such-config'"):
        convert(base_folder(), "no-such-config", out=tmp_path / "other")


@pytest.mark.parametrize(("link", "same_file"), [("auto", True), ("hard", True), ("copy", False)])
def test_link_modes(base_folder, tmp_path, link, same_file):
    base, out = base_folder(), tmp_path / "out"
    convert(str(base), settings(), out=out, link=link, verify=False, progress=quiet)
    written = out / "model-00001-of-00002.safetensors"
    assert os.path.samefile(base / "model.safetensors", written) == same_file
    assert digest(written) == digest(base / "model.safetensors")


def test_a_hub_cache_of_symbolic_links_leaves_no_dangling_link(base_folder, tmp_path):
    base = base_folder(name="blobs")
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    convert(str(snapshot), settings(), out=tmp_path / "out", verify=False, progress=quiet)
    written = list((tmp_path / "out").iterdir())
    assert written and not any(path.is_symlink() for path in written)
    assert json.loads((tmp_path / "out" / "linearize.json").read_bytes())["base"]["name"] == "owner/tiny"


def test_tied_embeddings_stay_tied(base_folder, tmp_path):
    out = tmp_path / "out"
    convert(str(base_folder("mqa_tied")), settings(), out=out, verify=False, progress=quiet)
    assert "lm_head.weight" not in read_weights(out).tensors
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_existing_output(base_folder, tmp_path):
    base, out = str(base_folder()), tmp_path / "out"
    convert(base, settings(), out=out, verify=False, progress=quiet)
    with pytest.raises(ConfigError, match="--overwrite"):
        convert(base, settings(), out=out, verify=False, progress=quiet)
    convert(base, settings(window=9), out=out, verify=False, overwrite=True, progress=quiet)
    assert json.loads((out / "linearize.json").read_bytes())["settings"]["window"] == 9
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ConfigError, match="not written by linearize"):
        convert(base, settings(), out=foreign, verify=False, overwrite=True, progress=quiet)
    assert (foreign / "thesis.tex").read_text() == "irreplaceable"


def test_of_a_link_the_folder_is_written(base_folder, tmp_path, cli):
    base = base_folder()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for window in ("8", "9"):
        code, _, err = cli("convert", base, "-o", tmp_path / "link", "--window", window, "--no-verify", "--overwrite")
        assert code == 0, err
        assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))
        assert json.loads((tmp_path / "disk" / "linearize.json").read_bytes())["settings"]["window"] == int(window)
    code, _, err = cli("convert", base, "-o", ".", "--window", "8")
    assert code == 2 and "is the current folder" in err


@pytest.mark.parametrize("keep", ["auto", "text:25%", "both:25%"])
def test_a_base_of_sliding_windows_alone_has_nothing_to_score(base_folder, tmp_path, cli, keep):
    config = json.loads((base := base_folder(num_hidden_layers=2) / "config.json").read_bytes())
    base.write_text(json.dumps({**config, "model_type": "mistral", "sliding_window": 24}))
    flags = ["--window", "12", "--set", "scoring.distances=[40]", "--keep-softmax", keep]
    code, _, err = cli("convert", base.parent, "-o", tmp_path / "out", *flags)
    assert code == 1 and "nothing to convert" in err and "--layers all" in err and "Traceback" not in err, err


def test_a_killed_conversion_leaves_nothing_that_looks_finished(base_folder, tmp_path):
    base, out = base_folder(), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "linearize", "convert", str(base), "-o", str(out), "--window", "8"]
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / ".out.partial").exists()
    convert(str(base), settings(), out=out, verify=False, progress=quiet)
    assert out.exists() and not (tmp_path / ".out.partial").exists()


def test_an_interrupted_conversion_leaves_nothing(base_folder, tmp_path, monkeypatch):
    def interrupt(folder, base):
        raise KeyboardInterrupt

    monkeypatch.setattr("linearize.workflows.convert.run_verification", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(str(base_folder()), settings(), out=tmp_path / "out", progress=quiet)
    assert not list(tmp_path.glob("*out*"))


def test_two_processes_do_not_write_one_output(base_folder, cli, tmp_path):
    base, out = base_folder(), tmp_path / "out"
    partial = tmp_path / ".out.partial"
    claim(partial)
    (partial / "half").touch()
    with alone_in(partial, out):
        code, _, err = cli("convert", base, "-o", out, "--window", "8")
        assert code == 2 and "another process is writing" in err and str(out) in err
        assert (partial / "half").exists()
    code, _, err = cli("convert", base, "-o", out, "--window", "8", "--no-verify")
    assert code == 0, err


def test_dry_run_and_plan_write_nothing(base_folder, cli, tmp_path):
    base = base_folder()
    before = sorted(tmp_path.rglob("*"))
    for command in (("convert", base, "--dry-run"), ("plan", base)):
        code, out, err = cli(*command, "--mixer", "gla", "--keep-softmax", "every:2", "--json")
        assert code == 0, err
        plan = json.loads(out)
        assert [len(layer["softmax_heads"]) for layer in plan["layers"]] == [3, 0, 3]
        assert plan["parameters_added"] == 6 and plan["coverage"]["heads_planned"] == 3
        assert plan["cache_bytes"]["32768"]["student"] < plan["cache_bytes"]["32768"]["base"]
    code, out, _ = cli("plan", base, "--keep-softmax", "none")
    assert code == 0 and "window 512 + 4 sinks" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_old_llama_buffers_are_ignored_by_name(base_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    base = base_folder()
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    student = convert(str(base), settings(), out=tmp_path / "out", progress=quiet)
    assert student.manifest.ignored_tensors == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_a_copy_stops_when_the_checks_fail(tmp_path, monkeypatch):
    """Leaving the block ends the copying between two steps, and the error is the block's own."""
    import threading

    from linearize.checkpoint import writing

    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(4096))
    monkeypatch.setattr(writing, "COPY_BYTES", 64)
    started, go_on = threading.Event(), threading.Event()
    real = os.sendfile

    def slowly(*arguments):
        started.set()
        go_on.wait(10)
        return real(*arguments)

    monkeypatch.setattr(os, "sendfile", slowly)
    with pytest.raises(ZeroDivisionError), writing.place_in_background({source: target}, "copy"):
        assert started.wait(10)
        threading.Timer(0.2, go_on.set).start()
        raise ZeroDivisionError
    assert target.stat().st_size < 4096
    target.unlink()
    monkeypatch.setattr(os, "sendfile", real)
    with writing.place_in_background({source: target}, "copy") as placed:
        assert placed() == "copy"
    assert target.read_bytes() == source.read_bytes()


def test_nothing_stays_of_a_copy_whose_checks_fail(base_folder, tmp_path, cli):
    base = base_folder()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    code, _, err = cli("convert", base, "-o", tmp_path / "made" / "out", "--link", "copy")
    assert code == 1 and "config.json asks for" in err
    assert not (tmp_path / "made").exists()


MIXED = {
    "0": {"mixer": "hedgehog", "mix": "joint"},
    "1": {"mixer": "mom", "mixer_options": {"inner": "kda"}, "gate": "learned", "window": 5},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer_folder):
    """Convert to three structures in one model. Return (base, folder)."""
    folder = tmp_path_factory.mktemp("mixed")
    path = folder / "mixed.yaml"
    path.write_text(json.dumps({"mixer": "gsa", "window": 8, "sinks": 2, "layers": MIXED}))
    base = write_base(folder / "base", tokenizer_folder)
    convert(str(base), load_config(str(path)), out=folder / "out", verify=False, progress=quiet)
    return base, folder / "out"


@pytest.mark.parametrize(
    ("setting", "values"),
    [("mixer", ["hedgehog", "mom", "gsa"]), ("mix", ["joint", "outside", "outside"]), ("window", [8, 5, 8])],
)
def test_layers_have_settings_of_their_own(mixed, setting, values):
    assert [layer[setting] for layer in written_layers(mixed[1])] == values


def test_a_layer_can_have_a_learned_gate(mixed):
    assert written_layers(mixed[1])[1]["gate"] == "learned"


def written_layers(out: Path) -> list[dict]:
    return json.loads((out / "config.json").read_bytes())["linearize"]["layers"]


def test_a_model_of_three_structures_passes_verification(mixed):
    base, out = mixed
    assert verify.verify(out, base)["softmax_everywhere_max_difference"] == 0


def test_the_portable_file_holds_the_structures_of_the_plan_alone(mixed):
    portable = (mixed[1] / "modeling_linearized.py").read_text()
    for name in ("class Hedgehog", "class MixtureOfMemories", "class KimiDeltaAttention", "class GatedSlotAttention"):
        assert name in portable
    assert "class RWKV7" not in portable


def test_window_and_sinks_alone(base_folder, tmp_path, cli):
    """`--mixer none` is what the recurrent branch of any other is switched off to, and adds nothing to the weights."""
    for mixer in ("none", "gla"):
        code, _, err = cli(
            "convert", base_folder(), "-o", tmp_path / mixer, "--mixer", mixer, "--window", 8, "--sinks", 2
        )
        assert code == 0, err
    manifest = Student.read(tmp_path / "none").manifest
    assert manifest.parameters_added == manifest.state_bytes == 0 and manifest.settings.mix == "none"
    assert not list((tmp_path / "none").glob("*00002*"))
    ids = torch.randint(2, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    alone, branched = (load_student(tmp_path / mixer, dtype=torch.float32) for mixer in ("none", "gla"))
    with torch.no_grad(), branched.recurrent_branch_off():
        assert torch.equal(alone(ids).logits, branched(ids).logits)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--mixer", "none", "--mix", "joint"], "mix: got 'joint', allowed with none is none"),
        (["--mixer", "gla", "--mix", "none"], "mix: got 'none', allowed with gla is outside or sum or joint"),
        (["--mixer", "none", "--set", "gate=learned"], "gate: none has no gate to learn"),
        (["--mixer", "none", "--set", "mix_options.log_mass=1"], "mix_options.log_mass: unknown key"),
    ],
)
def test_settings_that_a_window_alone_cannot_have(base_folder, cli, flags, wanted):
    code, _, err = cli("plan", base_folder(), *flags)
    assert code == 2 and wanted in err


def test_a_base_is_known_by_its_values(base_folder, tmp_path):
    """Also where config, names and shapes are the same; wherever it lies; and an adapter by the base under it."""
    prints = [local_fingerprint(str(base_folder(name=f"seed{seed}", seed=seed))) for seed in (0, 1)]
    assert prints[0] != prints[1]
    (tmp_path / "seed0").rename(tmp_path / "moved")
    assert local_fingerprint(str(tmp_path / "moved")) == prints[0] and local_fingerprint("owner/name") is None
    with safe_open(tmp_path / "moved" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name in tensors:
        changed = {**tensors, name: tensors[name] * 1.01}
        save_file(changed, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
        assert local_fingerprint(str(tmp_path / "moved")) != prints[0], name
    shutil.rmtree(tmp_path / "moved")
    adapter = Source(str(tmp_path / "seed1"), "adapter", tmp_path, "adapter", merged_into="one")
    assert adapter.fingerprint() != replace(adapter, merged_into="other").fingerprint()
