"""Other people's folders: their code does not run, their links are not followed, what is theirs is not removed."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from helpers import quiet
from safetensors.torch import load_file, save_file

from linearize.checkpoint import output_folder, work_folder
from linearize.checkpoint.output_folder import atomic_folder, check_target
from linearize.checkpoint.work_folder import MARK
from linearize.errors import ConfigError
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert

FLAGS = ("--window", "12", "--keep-softmax", "none", "--no-calibrate")


def snapshot(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_modules_in_the_current_folder_are_not_imported(base_folder, tmp_path):
    base = base_folder()
    for name in ("numpy", "torch", "linearize", "json", "random", "safetensors"):
        (base / f"{name}.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'a').write({name!r})")
    code = "import sys; sys.path = [p for p in sys.path if p]; from linearize.cli.app import main; main()"
    command = [sys.executable, "-P", "-c", code, "convert", ".", "-o", "../out", *FLAGS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), ".", ""])}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    run = subprocess.run(command, cwd=base, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "PWNED").exists() and (tmp_path / "out" / "linearize.json").is_file()


def with_tokenizer_code(base, tmp_path):
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(config))
    (base / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(tmp_path / 'RAN')!r}, 'a').write('x')\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    return base


def test_a_tokenizer_s_code_runs_only_if_it_is_trusted(base_folder, cli, tmp_path, monkeypatch):
    base = with_tokenizer_code(base_folder(), tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code, _, err = cli("convert", base, "-o", tmp_path / "out", "--window", "12", "--keep-softmax", "none")
    assert code == 2 and "--trust-remote-code" in err and not (tmp_path / "RAN").exists()
    flags = ("--window", "12", "--keep-softmax", "none", "--trust-remote-code", "--no-verify")
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *flags)
    assert code == 0 and (tmp_path / "RAN").exists() and (tmp_path / "out/tokenization_mine.py").is_file(), err


def test_trust_ends_with_the_call(base_folder, tmp_path):
    settings = load_config(None, {"window": 12, "keep_softmax": "none"})
    convert(str(base_folder()), settings, out=tmp_path / "a", verify=False, trust_remote_code=True, progress=quiet)
    base = with_tokenizer_code(base_folder(name="other"), tmp_path)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        convert(str(base), settings, out=tmp_path / "b", verify=False, progress=quiet)
    assert not (tmp_path / "RAN").exists()


def test_a_config_chooses_no_code(base_folder, tmp_path):
    """A kernel of a hub, named in config.json, is neither asked for nor loaded."""
    base = base_folder()
    config = json.loads((base / "config.json").read_text())
    chosen = {"_attn_implementation": "kernels-community/nothing", "_experts_implementation": "nothing"}
    (base / "config.json").write_text(json.dumps({**config, **chosen}))
    settings = load_config(None, {"window": 12, "keep_softmax": "none"})
    assert convert(str(base), settings, out=tmp_path / "out", progress=quiet).kind == "converted"


def conversion(base_folder, tmp_path, out="out"):
    settings = load_config(None, {"window": 12, "keep_softmax": "none"}, ["calibration.when=never"])
    return convert(str(base_folder()), settings, out=tmp_path / out, verify=False, progress=quiet).folder


def test_an_output_that_holds_its_input_is_not_replaced(base_folder, cli, tmp_path):
    out = conversion(base_folder, tmp_path)
    inner = conversion(base_folder, tmp_path, "out/ft")
    before = snapshot(out)
    for command in (
        ("convert", tmp_path / "base", "-o", out, "--overwrite", *FLAGS),
        ("finetune", inner, "-o", out, "--overwrite", "--recipe", "ci", "--seq-len", 64),
        ("convert", inner, "-o", out, "--overwrite", *FLAGS),
    ):
        code, _, err = cli(*command)
        assert code == 2 and err.count("\n") <= 2 and "ft" in err, err
        assert snapshot(out) == before


def test_an_output_with_somebody_s_notes_is_not_replaced(base_folder, cli, tmp_path):
    out = conversion(base_folder, tmp_path)
    (out / "notes.txt").write_text("mine")
    code, _, err = cli("convert", tmp_path / "base", "-o", out, "--overwrite", *FLAGS)
    assert code == 2 and "notes.txt" in err and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert cli("convert", tmp_path / "base", "-o", out, "--overwrite", "--no-verify", *FLAGS)[0] == 0
    assert not (out / MARK).exists()


@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_work_folders_of_somebody_else_are_left_alone(base_folder, cli, tmp_path, kind):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("mine")
    places = [tmp_path / ".out.partial", tmp_path / "tuned.training"]
    for place in places:
        if kind == "link":
            place.symlink_to(documents)
        elif kind == "folder":
            place.mkdir()
            (place / "thesis.txt").write_text("mine")
        else:
            place.write_text("mine")
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", *FLAGS)
    assert code == 2 and ".out.partial is in the way" in err
    student = conversion(base_folder, tmp_path, "student")
    for restart in ((), ("--restart",)):
        code, _, err = cli("finetune", student, "-o", tmp_path / "tuned", "--recipe", "ci", "--seq-len", 64, *restart)
        assert code == 2 and "tuned.training is in the way" in err, err
    assert (documents / "thesis.txt").read_text() == "mine"
    for place in places:
        assert (place / "thesis.txt" if kind != "file" else place).read_text() == "mine"


def test_links_that_leave_the_model_are_not_followed(base_folder, tmp_path):
    base, secret = base_folder(), tmp_path / "secret.txt"
    secret.write_text("secret")
    (base / "tokenizer_notes.txt").symlink_to(secret)
    (base / "LICENSE.link").symlink_to("LICENSE" if (base / "LICENSE").exists() else "config.json")
    (base / "additional_chat_templates").mkdir(exist_ok=True)
    (base / "additional_chat_templates/x.jinja").symlink_to(secret)
    settings = load_config(None, {"window": 12, "keep_softmax": "none"}, ["calibration.when=never"])
    out = convert(str(base), settings, out=tmp_path / "out", verify=False, progress=quiet).folder
    assert not any(b"secret" in content for content in snapshot(out).values())
    assert (out / "LICENSE.link").is_file() and not (out / "LICENSE.link").is_symlink()


@pytest.mark.parametrize("name", ["modeling_linearized.py", "README.md", "tokenizer.json", "weights.bin", "x.pt"])
def test_an_index_names_safetensors_alone(base_folder, cli, tmp_path, name):
    base = base_folder(shards=2)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: name if file == shard else file for key, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / shard).rename(base / name)
    before = snapshot(base)
    code, _, err = cli("convert", base, "-o", tmp_path / "out", *FLAGS)
    assert code == 1 and ".safetensors files" in err and snapshot(base) == before


def test_a_shard_with_a_name_of_ours_is_never_written_through(base_folder, tmp_path):
    """A base whose only shard has the name that a conversion would give to the parameters it adds."""
    base = base_folder()
    shard = "model-00002-of-00002.safetensors"
    (base / "model.safetensors").rename(base / shard)
    names = load_file(base / shard)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)})
    )
    before = snapshot(base)
    settings = load_config(None, {"mixer": "vq", "window": 12, "keep_softmax": "none"}, ["calibration.when=never"])
    convert(str(base), settings, out=tmp_path / "out", link="hard", progress=quiet)
    assert snapshot(base) == before


def test_assets_named_as_weights_are_not_written_over_them(base_folder, tmp_path):
    base = base_folder()
    save_file(load_file(base / "model.safetensors"), base / "tokenizer.safetensors", metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    names = load_file(base / "tokenizer.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "tokenizer.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    before = snapshot(base)
    settings = load_config(None, {"mixer": "vq", "window": 12, "keep_softmax": "none"}, ["calibration.when=never"])
    convert(str(base), settings, out=tmp_path / "out", link="hard", verify=False, progress=quiet)
    assert snapshot(base) == before


def test_a_failed_exchange_leaves_old_or_new(tmp_path, monkeypatch):
    """A run that dies between two renames loses nothing."""
    out = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_folder(out, overwrite=True) as folder:
            (folder / "linearize.json").write_text(text)
    assert (out / "linearize.json").read_text() == "new" and sorted(os.listdir(out)) == ["linearize.json"]
    monkeypatch.setattr("linearize.checkpoint.output_folder._exchange", lambda one, other: False)

    class Killed(BaseException):
        pass

    def killed(path, target):
        if path.name == ".out.partial":
            raise Killed
        return rename(path, target)

    rename = type(out).rename
    monkeypatch.setattr(type(out), "rename", killed)
    monkeypatch.setattr(work_folder.shutil, "rmtree", lambda *_, **__: None)  # a killed process clears nothing
    with pytest.raises(Killed), atomic_folder(out, overwrite=True) as folder:
        (folder / "linearize.json").write_text("newer")
    assert not out.exists()
    monkeypatch.undo()
    with pytest.raises(Exception, match="exists"), atomic_folder(out):
        pass
    assert (out / "linearize.json").read_text() == "new" and not list(tmp_path.glob(".out.replaced"))


def test_what_a_killed_replacement_left_is_cleared(tmp_path, monkeypatch):
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def killed(folder):
        raise Killed

    for text in ("old", "new"):
        monkeypatch.setattr(output_folder, "remove", killed)
        with contextlib.suppress(Killed), atomic_folder(out, overwrite=True) as folder:
            (folder / "linearize.json").write_text(text)
    assert (tmp_path / ".out.partial/linearize.json").read_text() == "old"
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="exists"):
        check_target(out, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == ["out"] and sorted(os.listdir(out)) == ["linearize.json"]
    assert (out / "linearize.json").read_text() == "new"


def test_abandoned_temporary_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    abandoned, foreign = tmp_path / "linearize-gguf-dead", tmp_path / "linearize-gguf-foreign"
    work_folder.claim(abandoned)
    (abandoned / "model.safetensors").write_bytes(b"x" * 100)
    foreign.mkdir()
    (foreign / "mine").touch()
    with work_folder.temporary_folder("gguf") as first, work_folder.temporary_folder("gguf") as second:
        assert first != second and first.is_dir() and second.is_dir()
        assert not abandoned.exists() and (foreign / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linearize-gguf-foreign"]


@pytest.mark.parametrize(
    "name", ["eval/notes.txt", "adapter/thesis.txt", "data.model/x", "license-keys/key", "my-other.safetensors"]
)
def test_nothing_foreign_inside_an_output_is_lost(base_folder, cli, tmp_path, name):
    out = conversion(base_folder, tmp_path)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    code, _, err = cli("convert", tmp_path / "base", "-o", out, "--overwrite", *FLAGS)
    assert code == 2 and name.split("/")[0] in err and (out / name).read_text() == "mine"


def test_settings_and_logs_inside_an_output_are_inputs(base_folder, cli, tmp_path):
    out = conversion(base_folder, tmp_path)
    (out / "eval").mkdir()
    (out / "eval/results.json").write_text("{}")
    for option, path in (("--config", out / "eval/results.json"), ("--log-file", out / "metrics.jsonl")):
        code, _, err = cli("convert", tmp_path / "base", "-o", out, "--overwrite", option, path)
        assert code == 2 and path.exists(), err


def test_a_report_takes_no_other_file_s_place(one_conversion, cli, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    (mine / "report.md").write_text("mine")
    command = ("eval", one_conversion, "--only", "parity", "-o", mine)
    code, _, err = cli(*command)
    assert code == 2 and "report.md" in err and (mine / "report.md").read_text() == "mine"
    (mine / "report.md").unlink()
    (mine / "plots").symlink_to(other)
    code, _, err = cli(*command)
    assert code == 2 and "plots" in err and not list(other.iterdir())
    (mine / "plots").unlink()
    assert cli(*command)[0] == 0 and cli(*command)[0] == 0


def test_tasks_that_run_code_are_refused(one_conversion, cli, tmp_path):
    (tmp_path / "td").mkdir()
    (tmp_path / "td/t.yaml").write_text("task: t\ndoc_to_text: !function evil.f\n")
    (tmp_path / "td/evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    flags = ("--only", "tasks", "--tasks", "t", "--tasks-dir", tmp_path / "td")
    code, _, err = cli("eval", one_conversion, *flags, "-o", tmp_path / "out")
    assert code == 2 and "--trust-remote-code" in err and not (tmp_path / "RAN").exists()


@pytest.fixture
def unfinished(one_conversion, cli, tmp_path):
    """Stop a training run of four steps after two, and return (command, its work folder)."""
    command = ("finetune", one_conversion, "-o", tmp_path / "out", "--recipe", "ci", "--seq-len", 64, "--tokens", 256)
    command += ("--set", "checkpoint_every=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearize.training.loop.StageTrainer.log", stopping_at(3))
        assert cli(*command)[0] == 1
    work = tmp_path / "out.training"
    assert [path.name for path in sorted(work.glob("step-*"))] == ["step-00000001", "step-00000002"]
    return command, work


def stopping_at(step: int):
    from linearize.training.loop import StageTrainer

    log = StageTrainer.log

    def logged(self, number, *arguments, **options):
        if number == step:
            raise OSError("stopped")
        log(self, number, *arguments, **options)

    return logged


@pytest.mark.parametrize(
    "damage",
    [
        lambda work: (work / "metrics.jsonl").unlink(),
        lambda work: (work / "metrics.jsonl").write_text("x\ny\n"),
        lambda work: (work / "metrics.jsonl").write_text("[1]\n[2]\n"),
        lambda work: os.truncate(work / "metrics.jsonl", (work / "metrics.jsonl").stat().st_size - 15),
        lambda work: (work / "step-00000002").rename(work / "step-99999999"),
        lambda work: (work / "step-00000002/state.safetensors").write_bytes(b"x"),
    ],
)
def test_a_damaged_unfinished_run_is_refused_or_goes_on_from_before(unfinished, cli, damage):
    command, work = unfinished
    damage(work)
    code, _, err = cli(*command)
    if code == 0:  # from the state before
        assert "is passed over" in err and "resuming out.training after step 1" in err
        steps = [json.loads(line)["step"] for line in (work.parent / "out/metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]
    else:
        assert code == 2 and "--restart" in err and not (work.parent / "out").exists()


def test_a_state_beyond_the_run_is_refused(unfinished, cli):
    command, work = unfinished
    state = work / "step-00000002"
    record = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**record, "step": 900}))
    state.rename(work / "step-00000900")
    code, _, err = cli(*command)
    assert code == 2 and "step-00000900" in err and not (work.parent / "out").exists()
