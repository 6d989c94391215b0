"""Load configs and recipes: packaged names, YAML files, flags and `--set`.

A key is set by, later ones winning: the schema's default, the named or given YAML file, a command-line flag, `--set`.
Unknown keys and wrong values are collected at every depth and reported together.
"""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from linearize.errors import ConfigError, nearest
from linearize.settings.config import ConversionConfig
from linearize.settings.recipe import Recipe
from linearize.settings.schema import explain
from linearize.settings.yaml_file import parse_value, read_yaml

Kind = Literal["recipes", "configs"]
Schema = TypeVar("Schema", bound=BaseModel)
COMMAND_LINE = "command line"


def packaged(kind: Kind) -> dict[str, Path]:
    """Return the YAML files that are part of the package, by name."""
    return {path.stem: path for path in sorted(packaged_folder(kind).glob("*.yaml"))}


def packaged_folder(kind: Kind) -> Path:
    """Return the folder of the package's own configs or recipes."""
    folder = Path(str(importlib.resources.files("linearize"))) / kind
    if not folder.is_dir():  # a source checkout keeps them beside the package
        folder = Path(__file__).resolve().parents[2] / kind
    return folder


def load_config(
    name: str | None,
    flags: dict[str, Any] | None = None,
    sets: Sequence[str] | None = None,
    given_in: str = COMMAND_LINE,
) -> ConversionConfig:
    """Load a config with flags and `--set` laid over it.

    Args:
        name: a packaged config, a YAML file, or None for the defaults.
        flags: values by dotted key; None leaves a key as it is.
        sets: texts `key=value`, the value in YAML.
        given_in: the place of name, flags and sets, for error messages.

    Raises:
        ConfigError: one line for every wrong key and value.
    """
    return _load(ConversionConfig, "configs", name, flags, sets, given_in)


def load_recipe(
    name: str,
    flags: dict[str, Any] | None = None,
    sets: Sequence[str] | None = None,
    given_in: str = COMMAND_LINE,
) -> Recipe:
    """Load a recipe with flags and `--set` laid over it; arguments and errors are those of `load_config`."""
    return _load(Recipe, "recipes", name, flags, sets, given_in)


def _load(
    schema: type[Schema],
    kind: Kind,
    name: str | None,
    flags: dict[str, Any] | None,
    sets: Sequence[str] | None,
    given_in: str,
) -> Schema:
    """Read the file, lay flags and sets over it, and validate the result. Arguments as in `load_config`."""
    data: dict[str, Any] = {}
    origin = given_in
    if name is not None:
        path = _find(kind, name)
        data, origin = read_yaml(path), str(path)
    given_keys = _apply_flags(data, flags or {}) + _apply_sets(data, sets or ())
    try:
        return schema.model_validate(data)
    except ValidationError:
        problems = _all_problems(schema, data)
    # a problem starts with its key; one of a given key, or of a key below it, came from flags or sets
    given_prefixes = tuple(f"{key}{end}" for key in given_keys for end in (":", "."))
    lines = [f"{given_in if problem.startswith(given_prefixes) else origin}: {problem}" for problem in problems]
    raise ConfigError("\n".join(lines))


def _find(kind: Kind, name: str) -> Path:
    """Return the file of a packaged name, or the .yaml file of that name."""
    option = f"--{kind[:-1]}"
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{option}: no file '{name}'")
        return Path(name)
    files = packaged(kind)
    if name not in files:
        allowed = ", ".join(files)
        raise ConfigError(f"{option}: got '{name}', allowed are {allowed} or a .yaml file{nearest(name, files)}")
    return files[name]


def _apply_flags(data: dict[str, Any], flags: dict[str, Any]) -> list[str]:
    """Set the flags that have a value, and return their keys.

    The flag `stages` is set last. So a key that a stage states itself is not removed by another flag.
    """
    keys = []
    stages_last = sorted(flags.items(), key=lambda flag: flag[0] == "stages")
    for key, value in stages_last:
        if value is None:
            continue
        if value != data.get(key):
            data.pop(f"{key}_options", None)  # another mixer or mix has other options
        _set_key(data, key, value)
        keys.append(key)
    return keys


def _apply_sets(data: dict[str, Any], sets: Sequence[str]) -> list[str]:
    """Set the values of `--set` and return their keys."""
    keys = []
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set: got '{text}', allowed is key=value, for example --set window=128")
        try:
            _set_key(data, key, parse_value(value))
        except yaml.YAMLError:
            raise ConfigError(f"--set: got '{text}', whose value is not valid YAML") from None
        keys.append(key)
    return keys


def _set_key(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one key, or each key of a mapping; in a recipe of stages the value holds for every stage."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _set_key(data, f"{dotted}.{key}", item)
        return
    *parents, last = dotted.split(".")
    group = data
    for parent in parents:
        group = group.setdefault(parent, {})
        if not isinstance(group, dict):
            raise ConfigError(f"--set {dotted}: '{parent}' is a value, not a group of keys")
    group[last] = value
    _remove_from_stages(data.get("stages"), dotted)


def _remove_from_stages(stages: Any, dotted: str) -> None:
    """Remove a key from every stage of a recipe, so that the recipe's own value holds."""
    if not isinstance(stages, list) or not stages:
        return
    if dotted == "loss.kind":
        raise ConfigError("loss.kind: in a recipe of stages their names decide it; set the stages themselves")
    for stage in stages:
        _remove(stage, dotted.split("."))


def _all_problems(schema: type[BaseModel], data: dict[str, Any]) -> list[str]:
    """Return a line for every problem of `data`, each line once. The invalid keys are removed from `data`.

    Pydantic runs a validator of several keys only if each of these keys is valid. So the invalid keys are removed and
    the rest is validated again, until nothing is invalid or nothing can be removed.
    """
    problems: list[str] = []
    removed = True
    while removed:
        errors = _validation_errors(schema, data)
        for error in errors:
            problems += explain(error, schema).splitlines()
        # a list: any() of a generator would stop at the first key
        removals = [_remove(data, error["loc"]) for error in errors]
        removed = any(removals)
    return list(dict.fromkeys(problems))


def _validation_errors(schema: type[BaseModel], data: dict[str, Any]) -> list[ErrorDetails]:
    """Return pydantic's errors for `data`, none if it is valid."""
    try:
        schema.model_validate(data)
    except ValidationError as error:
        return error.errors()
    return []


def _remove(data: Any, location: Sequence[int | str]) -> bool:
    """Remove the key at `location` from nested mappings and lists; return True if it was there.

    An item of a list is no key and stays.
    """
    if not location:
        return False
    *parents, last = location
    for key in parents:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return False
    if isinstance(data, dict) and last in data:
        del data[last]
        return True
    return False
