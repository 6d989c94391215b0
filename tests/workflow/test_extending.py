"""A new mixer, measurement or family is one file and one or two registry lines, counted on a copy of the package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import LINEAR, ROOT

MIXER = '''"""A recurrence that forgets nothing."""

from linearize.mixers.mixer import Mixer, outer, read_state
from linearize.ops.simple_gla import simple_gla


class Cumulative(Mixer):
    def update(self, state, k, v):
        return state + outer(k.softmax(-1), v)

    def read(self, before, after, q, k, v):
        return read_state(after, q.softmax(-1))

    def chunked(self, q, k, v, scan):
        (write,) = scan.mask_writes(k.softmax(-1))
        return simple_gla(q.softmax(-1), write, v, initial_state=scan.initial_state, segments=scan.segments)
'''
MIXER_LINE = """    "cumulative": _entry("cumulative:Cumulative", "no decay", "test", positive=True),
"""
FAMILY = '''"""Helium, for this test alone."""

from linearize.families.family import family

HELIUM = family("helium", "Helium", covers="Helium 1")
'''
MEASUREMENT = '''"""Count the text's different tokens."""

from __future__ import annotations

from functools import partial

from linearize.evaluation.measurement import Measurement, Option, Stage
from linearize.report.results import STUDENT, StageResult, make_metric


class Variety(Measurement):
    name = "variety"
    options = (Option("variety", int, (), least=8, suites={"quick": (16,)}),)

    def metrics(self, suite):
        return {f"variety@{length}": {STUDENT} for length in suite.variety}

    def window_tokens(self, suite):
        return max(suite.variety, default=0)

    def positions(self, item):
        return item

    def stages(self, suite, inputs):
        for length in suite.variety:
            yield Stage(f"variety@{length}", partial(measure, length=length))


def measure(context, length):
    different = float(context.text[:length].unique().numel())
    return StageResult(metrics=(make_metric(f"variety@{length}", "higher", {STUDENT: [different]}),))


MEASUREMENT = Variety()
'''
MEASUREMENT_LINE = """    "variety": "variety",
"""


@pytest.fixture
def copy(tmp_path):
    """(package folder, runner): a copy of the package that subprocesses import instead of the installed one."""
    shutil.copytree(ROOT / "linearize", tmp_path / "src" / "linearize", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("recipes", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "src" / name)

    def run(*arguments) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        # safe path off, so that the copy and not an editable install is found first
        command = [sys.executable, "-m", "linearize", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path / "src")

    return tmp_path / "src" / "linearize", run


def touched(package) -> tuple[set[str], int]:
    """Files that are new, and lines that were added to files that are not."""
    new, lines = set(), 0
    for path in package.rglob("*.py"):
        original = ROOT / "linearize" / path.relative_to(package)
        if not original.exists():
            new.add(str(path.relative_to(package)))
        else:
            lines += len(path.read_text().splitlines()) - len(original.read_text().splitlines())
    return new, lines


def test_a_mixer_is_one_file_and_one_line(copy, base_folder, tmp_path):
    package, run = copy
    (package / "mixers" / "cumulative.py").write_text(MIXER)
    registry = package / "mixers" / "registry.py"
    text = registry.read_text()
    registry.write_text(text.replace("MIXERS = {\n", "MIXERS = {\n" + MIXER_LINE))
    assert touched(package) == ({"mixers/cumulative.py"}, 1)
    done = run("convert", base_folder(), "-o", tmp_path / "out", "--mixer", "cumulative", "--window", "8")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert "class Cumulative" in (tmp_path / "out" / "modeling_linearized.py").read_text()


def test_a_family_is_one_file_and_one_registry_entry(copy, tmp_path):
    """The entry is two lines, one of them the import."""
    import torch
    from transformers import HeliumConfig, HeliumForCausalLM

    package, run = copy
    (package / "families" / "helium.py").write_text(FAMILY)
    registry = package / "families" / "registry.py"
    text = registry.read_text()
    text = text.replace("import LLAMA\n", "import LLAMA\nfrom linearize.families.helium import HELIUM\n")
    registry.write_text(text.replace("    LLAMA,\n", "    LLAMA,\n    HELIUM,\n"))
    assert touched(package) == ({"families/helium.py"}, 2)
    torch.manual_seed(0)
    config = HeliumConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    HeliumForCausalLM(config).save_pretrained(tmp_path / "base")
    done = run("convert", tmp_path / "base", "-o", tmp_path / "out", *LINEAR)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout


def test_a_measurement_is_one_file_and_one_line(copy, base_folder, tmp_path):
    """Its options, suites, gates, cuts and stages follow; a pipeline can set it."""
    package, run = copy
    (package / "evaluation" / "variety.py").write_text(MEASUREMENT)
    registry = package / "evaluation" / "registry.py"
    text = registry.read_text()
    registry.write_text(text.replace("FILES = {\n", "FILES = {\n" + MEASUREMENT_LINE))
    assert touched(package) == ({"evaluation/variety.py"}, 1)
    out = tmp_path / "out"
    (tmp_path / "pipeline.yaml").write_text(
        f"model: {base_folder()}\nout: {out}\nconvert: {{window: 12, calibration: {{when: never}}}}\n"
        "eval: {only: variety, variety: [32, 4096], gates: [variety@32.student>=2]}\n"
    )
    done = run("run", tmp_path / "pipeline.yaml")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "eval" / "results.json").read_bytes())
    assert [metric["name"] for metric in results["metrics"]] == ["variety@32"]
    assert results["verdict"] == "passed 1 gate(s)"
    assert "variety 4096 left out: longer than the base's 512 positions" in results["notes"]
    done = run("eval", out / "converted", "--only", "variety", "--gate", "variety@16.base<=1")
    assert done.returncode == 2 and "variety@16 has no 'base' here" in done.stderr
