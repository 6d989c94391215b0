"""The shape of the source tree, read with `ast` alone: rooms and their imports, sizes, words and names."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "linearize"
# a room may import from rooms on lower floors, never from its own floor or above
FLOORS = (
    {"cli"},
    {"workflows"},
    {"evaluation"},
    {"conversion"},
    {"training"},
    {"modeling", "data", "report"},
    {"checkpoint", "settings"},
    {"mixers", "families"},
    {"ops"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# imported by all; they import nothing of ours but errors
COMMON = {"errors", "plan", "device", "progress"}
# in front of every floor, so that they may import from all
FRONT = {"", "__main__"}
ALLOWED_AT_ROOT = {"__init__", "__main__", "plan", "errors", "device", "progress"}

LONGEST_FUNCTION, LONGEST_FILE = 60, 400
# function -> why it is longer
LONG_FUNCTIONS: dict[str, str] = {
    "cli/eval.py:evaluate": "its signature has one line for each of 26 options",
    "workflows/convert.py:convert": "its docstring explains every argument and has an example that a test runs",
}
# file -> why it is longer
LONG_FILES: dict[str, str] = {}


@functools.cache
def sources() -> dict[str, Path]:
    """Return the modules of the package by their dotted name without `linearize`; the package itself is ""."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(nodes) -> set[str]:
    """Return the modules of the package that import statements among `nodes` name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "linearize":
            module = node.module.removeprefix("linearize").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                found.add(inner if inner in sources() else module)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "linearize"]
            found |= {name.removeprefix("linearize").removeprefix(".") for name in names}
    return found


def imports_of(module: str) -> set[str]:
    """Return what a module imports anywhere, inside functions too, but not for the type checker alone."""
    tree = tree_of(sources()[module])
    checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    typed_only = {id(inner) for node in checking for statement in node.body for inner in ast.walk(statement)}
    return imported_modules(node for node in ast.walk(tree) if id(node) not in typed_only)


def may_import(importer: str, imported: str) -> bool:
    """Tell if the import rule lets a module of the room `importer` import one of the room `imported`."""
    if importer == imported or importer in FRONT:
        return True
    if importer in COMMON:
        return imported == "errors"
    return imported in COMMON or FLOOR.get(imported, -1) > FLOOR[importer]


def room_of(module: str) -> str:
    return module.split(".")[0]


def functions() -> list[tuple[str, int]]:
    """Return every function of the package as (file:name, lines)."""
    return [
        (f"{path.relative_to(PACKAGE).as_posix()}:{node.name}", node.end_lineno - node.lineno + 1)
        for path in sources().values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_every_folder_stands_on_a_floor():
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/*.py")}
    assert folders == set(FLOOR)


def test_rooms_import_only_from_lower_floors():
    wrong = [
        f"{module} imports {imported}"
        for module in sources()
        for imported in sorted(imports_of(module))
        if not may_import(room_of(module), room_of(imported))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    remaining = {module: imports_of(module) - {module, ""} for module in sources() if module}
    while free := [module for module, wanted in remaining.items() if not wanted & remaining.keys()]:
        for module in free:
            del remaining[module]
    # what is left lies in a circle or imports from one
    assert not remaining, sorted(remaining)


def test_the_root_holds_only_what_all_rooms_need():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= ALLOWED_AT_ROOT


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_folder_says_what_lives_in_it(room):
    text = ast.get_docstring(tree_of(PACKAGE / room / "__init__.py"))
    assert text and text.split("\n\n")[0].endswith(".")


def test_no_function_is_longer_than_a_screen():
    long = {name: lines for name, lines in functions() if lines > LONGEST_FUNCTION and name not in LONG_FUNCTIONS}
    assert not long, long


def test_no_file_is_longer_than_one_topic():
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources().values()
    }
    long = {file: lines for file, lines in lengths.items() if lines > LONGEST_FILE and file not in LONG_FILES}
    assert not long, long


def test_exceptions_are_still_needed():
    lines_of = dict(functions())
    unneeded = [name for name in LONG_FUNCTIONS if lines_of.get(name, 0) <= LONGEST_FUNCTION]
    for file in LONG_FILES:
        path = PACKAGE / file
        if not path.is_file() or len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE:
            unneeded.append(file)
    assert not unneeded


def test_docstrings_begin_with_a_verb_and_not_with_a_question():
    wrong = []
    for path in [*sources().values(), *sorted((ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if re.match(r"(What|Whether|Of|How many|Where)\b", text):
                    wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def top_level_names(path: Path) -> set[str]:
    """Return the classes, functions and constants that a module defines at its top."""
    names = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_names_of_the_portable_file_are_unique():
    """The portable file joins these modules into one namespace, whatever structure a plan names."""
    modules = {name for name in sources() if name.startswith("mixers.")} | {"modeling.attention", "modeling.factory"}
    waiting = list(modules)
    while waiting:
        # only imports at the top: the export leaves those of functions out
        for imported in imported_modules(tree_of(sources()[waiting.pop()]).body) - modules:
            modules.add(imported)
            waiting.append(imported)
    modules -= {"mixers", "mixers.registry", "families.registry"}
    counts = Counter(name for module in modules for name in top_level_names(sources()[module]))
    assert not [name for name, times in counts.items() if times > 1]
