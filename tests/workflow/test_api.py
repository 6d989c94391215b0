"""The Python interface: light to import, complete, and with examples that run."""

import ast
import doctest
import inspect
import subprocess
import sys

import pytest
from helpers import ROOT

import linearize

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "pydantic", "yaml", "numpy"}
FUNCTIONS = ("convert", "finetune", "evaluate")


def run_example(function) -> None:
    """Run the example in a function's docstring line by line, and compare each value that it shows."""
    names: dict[str, object] = {}
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(function))
    assert examples, f"{function.__name__} has no example"
    for example in examples:
        if example.want:
            assert repr(eval(example.source, names)) == example.want.strip(), example.source
        else:
            exec(example.source, names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    """Make a folder that holds a base model, `my-model`, and its conversion, `my-student`."""
    import shutil

    from helpers import tiny_base

    folder = tmp_path_factory.mktemp("api")
    tiny_base().save_pretrained(folder / "my-model")
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / "my-model" / path.name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run_example(linearize.convert)
    return folder


def test_the_import_loads_nothing_heavy():
    script = "import sys, linearize; dir(linearize); print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    command = [sys.executable, "-c", script, *HEAVY]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_listed_imported_and_known_to_type_checkers():
    tree = ast.parse((ROOT / "linearize" / "__init__.py").read_text(encoding="utf-8"))
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in checking.body for alias in node.names}
    assert typed == linearize._MODULES and sorted(typed) == sorted(linearize.__all__)
    assert set(typed) <= set(dir(linearize))
    for name in typed:
        assert getattr(linearize, name).__name__ == name
    assert (ROOT / "linearize" / "py.typed").is_file()


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = linearize.convrt


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_typed_and_documented(name):
    function = getattr(linearize, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{parameter.name}: " in text, parameter.name
    assert "Returns:" in text and "Raises:" in text


def test_the_example_of_convert_runs(folder):
    assert (folder / "my-student" / "linearize.json").is_file()


@pytest.mark.parametrize("name", FUNCTIONS[1:])
def test_the_example_runs_on_a_converted_model(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    run_example(getattr(linearize, name))
