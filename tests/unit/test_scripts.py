"""Scripts import, say how to call them, and are listed."""

import importlib
import re
import sys

import pytest
from helpers import ROOT

SCRIPTS = ROOT / "scripts"
# modules that other scripts import
LIBRARIES = {"commands", "results_file"}
# packages that only some scripts need, and that the tests' environment may lack
OPTIONAL = {"pyarrow"}


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_a_python_script_imports_and_has_a_usage_line(name, monkeypatch):
    """Importing finds every name that a script takes from the package; none may run anything by being imported."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    finally:
        sys.modules.pop(name, None)
    assert name in LIBRARIES or f"python scripts/{name}.py" in module.__doc__
    assert name in LIBRARIES or callable(module.main)


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_a_shell_script_has_a_usage_line(name):
    comments = re.match(r"#!/bin/bash\n((#.*\n)+)", (SCRIPTS / name).read_text(encoding="utf-8"))[1]
    assert name in comments


def test_every_script_is_listed_in_one_line():
    text = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+)` \| .+ \|$", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in SCRIPTS.iterdir() if path.suffix in (".py", ".sh"))
    assert len(text.splitlines()) < 40
