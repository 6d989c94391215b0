"""Models outside this process: pickles, the portable file without the package, and imports in either order."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import LOUD, SHAPES, plan_for, tiny_base, tiny_student, tokens
from safetensors.torch import save_file

from linearize.mixers.registry import MIXERS
from linearize.plan import NO_BRANCH, LayerPlan, Plan

MIXES = ["outside", "windows", "sum", NO_BRANCH]
STUDENTS = [f"{shape}-{mix}" for shape in SHAPES for mix in MIXES]
EVERY_STRUCTURE = "every-structure"


def student_named(name: str):
    """Return the tiny student of a shape and a mix, or one with a layer of every structure."""
    if name == EVERY_STRUCTURE:
        base = tiny_base(num_hidden_layers=len(MIXERS))
        layers = tuple(LayerPlan((), mixer=mixer, window=5, mix_options=LOUD) for mixer in MIXERS)
        return tiny_student(Plan("llama", layers), base)
    shape, mix = name.split("-")
    base = tiny_base(shape)
    return tiny_student(plan_for(mix, base.config.num_key_value_heads), base)


# One fresh process imports torch and transformers, for that takes seconds, and forks into one process for every model:
# transformers would take the class of the first model for all of them.
LOOP = """
import json, os, sys, traceback
import transformers.models.llama.modeling_llama
failures = {}
for name in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            check(name)
        except BaseException:
            os.write(writer, traceback.format_exc()[-3000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        failures[name] = pipe.read()
    _, status = os.wait()
    if status and not failures[name]:
        failures[name] = f"ended with status {status}"
print(json.dumps(failures))
"""


def check_apart(script: str, names: list[str], folder) -> dict[str, str]:
    """Run check(name), which `script` defines, apart from this process. Return what failed by name, "" for nothing."""
    command = [sys.executable, "-c", script + LOOP, json.dumps(names)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


UNPICKLE = """
import torch
def check(name):
    saved = torch.load(name + ".pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(saved["model"](saved["ids"]).logits, saved["logits"], rtol=1e-6, atol=1e-4)
"""


@pytest.fixture(scope="module")
def unpickled(tmp_path_factory):
    """Pickle every student whole and load it in another process: name -> failure."""
    folder = tmp_path_factory.mktemp("pickles")
    for name in STUDENTS:
        student = student_named(name)
        with torch.no_grad():
            logits = student(tokens()).logits
        torch.save({"model": student, "ids": tokens(), "logits": logits}, folder / f"{name}.pt")
    return check_apart(UNPICKLE, STUDENTS, folder)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_pickled_model_loads_in_another_process(unpickled, name):
    assert unpickled[name] == ""


PORTABLE = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "linearize":
            raise ModuleNotFoundError("linearize is blocked")
sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
def check(name):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    expected = load_file(name + "/expected.safetensors")
    with torch.no_grad():
        # two processes may add up a product in different orders
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-6, atol=1e-4)
        model.generate(expected["ids"], max_new_tokens=3, pad_token_id=1)
    model.save_pretrained(name + "/again")
    assert "linearize" not in sys.modules
"""


@pytest.fixture(scope="module")
def loaded_without_the_package(tmp_path_factory):
    """Save every student and load it where the package cannot be imported: (name -> failure, folder)."""
    folder = tmp_path_factory.mktemp("portable")
    names = [*STUDENTS, EVERY_STRUCTURE]
    for name in names:
        student = student_named(name)
        student.save_pretrained(folder / name)
        with torch.no_grad():
            logits = student(tokens()).logits
        save_file({"ids": tokens(), "logits": logits}, folder / name / "expected.safetensors")
    return check_apart(PORTABLE, names, folder), folder


@pytest.mark.parametrize("name", [*STUDENTS, EVERY_STRUCTURE])
def test_the_portable_file_computes_the_same_without_the_package(loaded_without_the_package, name):
    assert loaded_without_the_package[0][name] == ""


@pytest.mark.parametrize("name", [*STUDENTS, EVERY_STRUCTURE])
def test_a_model_saved_without_the_package_is_portable_too(loaded_without_the_package, name):
    assert (loaded_without_the_package[1] / name / "again" / "modeling_linearized.py").is_file()


@pytest.mark.parametrize("linearize_first", [True, False, "factory"])
def test_importing_the_package_registers_the_classes(tmp_path, linearize_first):
    base = tiny_base("gqa")
    tiny_student(plan_for("outside", 3), base).save_pretrained(tmp_path)
    imports = ["import linearize", "from transformers import AutoModelForCausalLM"]
    lines = imports if linearize_first else imports[::-1]
    if linearize_first == "factory":
        lines = ["import linearize.modeling.factory", imports[1]]
    script = ";".join([*lines, f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "LinearizedLlamaForCausalLM", run.stderr[-2000:]
