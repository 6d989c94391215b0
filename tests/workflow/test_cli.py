"""The command line: light, pure in JSON, the same in help and in README."""

import json
import re
import subprocess
import sys

import pytest
from helpers import LINEAR

COMMANDS = ["convert", "plan", "finetune", "eval", "run", "bench", "scores", "list", "doctor"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_light_and_complete(command):
    script = (
        "import sys; from linearize.cli.app import run\n"
        f"code = run({[*command, '--help']!r})\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'safetensors', 'rich', 'yaml'}\n"
        "heavy &= set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), code)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert "HEAVY [] 0" in out
    if command:
        shown = out[out.index("Examples") :]
        assert len(re.findall(r"^\s*(linearize|torchrun)", shown, re.MULTILINE)) == 3
        assert "Exit codes" in shown and "--json" in out


@pytest.mark.parametrize(
    "command",
    [
        *(f"{name} ./nowhere" for name in ("convert", "plan", "finetune", "eval", "run", "bench model")),
        *(
            "finetune",
            "eval",
            "convert x --window 0",
            "finetune --tokens many",
            "eval --lengths a",
            "bench ops --only gal",
        ),
    ],
)
def test_a_refusal_loads_nothing_heavy(command, tmp_path):
    """A wrong path or option is refused in a fraction of a second, so before torch and transformers are imported."""
    script = (
        "import sys; from linearize.cli.app import run\n"
        f"code = run({command.split()!r})\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)), code)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout == "[] 2\n", process.stderr


@pytest.mark.parametrize("kind", ["mixers", "families", "recipes", "configs"])
def test_list(cli, kind):
    code, out, _ = cli("list", kind, "--json")
    rows = json.loads(out)
    assert code == 0 and rows and all(row["name"] for row in rows)
    code, text, _ = cli("list", kind)
    assert code == 0 and all(row["name"] in text for row in rows)


def test_list_says_why_a_family_is_refused(cli):
    rows = {row["name"]: row for row in json.loads(cli("list", "families", "--json")[1])}
    assert rows["llama"]["status"] == "supported" and rows["gpt2"]["status"] == "refused" and rows["gpt2"]["why"]


def test_unknown_kind_and_command(cli):
    assert cli("list", "mixer")[0] == 2
    assert cli("convrt")[0] == 2


def test_doctor(cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("linearize.workflows.doctor.bf16_is_fast", lambda: False)
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] and found["devices"]["cpu threads"] > 0
    assert any("hub does not answer" in line for line in found["advice"]) and not found["hub"]["answers"]
    assert any("bf16 is not faster" in line for line in found["advice"])
    assert 0 < found["memory"]["available GiB"] <= found["memory"]["total GiB"] and found["disk"]["free GiB here"] > 0


def test_every_command_prints_one_document(base_folder, cli, tmp_path):
    flags = ["--set", "seq_len=300", "--set", "tokens=300", "--set", "lora.rank=1"]
    for arguments in (
        ("plan", base_folder(), "--json"),
        ("convert", tmp_path / "base", "-o", "linearized/a", "--window", "8", "--no-verify", "--json"),
        ("finetune", *flags, "--json"),
        ("eval", "--lengths", "32", "--recall", "8", "--max-tokens", "64", "--json"),
    ):
        code, out, err = cli(*arguments)
        assert code == 0, err
        assert isinstance(json.loads(out), dict)


def test_a_non_zero_failure_is_never_silent(cli, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the unforeseen")

    monkeypatch.setattr("linearize.workflows.doctor.examine", broken)
    code, out, err = cli("doctor", "--json")
    assert code == 1 and "the unforeseen" in err and json.loads(out)["exit_code"] == 1


def test_out_of_memory_has_its_code(cli, monkeypatch):
    def hungry(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("linearize.workflows.doctor.examine", hungry)
    assert cli("doctor")[0] == 5


def test_bench_measures_every_structure(cli):
    from linearize.mixers.registry import MIXERS

    code, out, _ = cli("bench", "ops", "--lengths", "40", "--heads", "2", "--dim", "4", "--repeats", "1", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["structure"] for row in rows] == list(MIXERS)
    assert all(min(row["ratio"], row["structure_seconds"], row["softmax_seconds"]) > 0 for row in rows)
    code, _, err = cli("bench", "ops", "--only", "gal")
    assert code == 2 and "did you mean 'gla'" in err


def test_an_interruption_is_one_document_too(cli, monkeypatch):
    from linearize.workflows import doctor

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    for name in [
        name for name, value in vars(doctor).items() if callable(value) and value.__module__ == doctor.__name__
    ]:
        monkeypatch.setattr(doctor, name, stop)
    code, out, _ = cli("doctor", "--json")
    assert code == 130 and json.loads(out) == {"error": "interrupted", "exit_code": 130}


def test_no_permission_and_no_folder_above(base_folder, cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "file" / "out")
    assert code == 2 and "Not a directory" in err
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, err = cli("plan", base_folder())
    assert code == 0, err
    code, _, err = cli("convert", base_folder(), "-o", tmp_path / "out", "--dry-run")
    assert code == 2 and "no permission" in err


def test_a_terminated_command_clears_up_and_says_so(tmp_path):
    """SIGTERM, as CI systems and schedulers send it, is an interruption."""
    script = (
        "import os, signal, tempfile\n"
        "from linearize.cli import app\n"
        "def examine():\n"
        "    with tempfile.TemporaryDirectory(dir='.'):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "import linearize.workflows.doctor\n"
        "linearize.workflows.doctor.examine = examine\n"
        "import sys\n"
        "sys.argv = ['linearize', 'doctor', '--json']\n"
        "app.main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 130 and json.loads(run.stdout)["exit_code"] == 130 and not list(tmp_path.iterdir())


def test_notes_that_nobody_reads_stop_nothing(base_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "linearize",
        "convert",
        str(base_folder()),
        "-o",
        str(tmp_path / "out"),
        "--no-verify",
        *LINEAR,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stderr.close()
        assert process.stdout.read().strip().endswith(str(tmp_path / "out"))
    assert process.returncode == 0 and (tmp_path / "out" / "linearize.json").is_file()


def test_what_belongs_to_the_other_bench_is_refused(cli, tmp_path):
    for arguments in (("ops", tmp_path), ("model", tmp_path, "--only", "gla")):
        code, out, err = cli("bench", *arguments)
        assert (code, out) == (2, "") and "it belongs to bench" in err


def test_a_reader_that_went_away_is_no_failure():
    command = [sys.executable, "-m", "linearize", "list", "mixers", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
