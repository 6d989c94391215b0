"""Load configs and recipes: packaged names, YAML files, flags and `--set`, in order of precedence."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from linearize.errors import ConfigError, nearest
from linearize.settings.config import ConversionConfig, LayerSettings, unknown_key
from linearize.settings.recipe import Recipe
from linearize.settings.yaml_file import _Loader, read_yaml


def packaged(kind: Literal["recipes", "configs"]) -> dict[str, Path]:
    """The YAML files that ship with the package, by name."""
    folder = Path(str(importlib.resources.files("linearize"))) / kind
    if not folder.is_dir():  # a source checkout keeps them beside the package
        folder = Path(__file__).resolve().parents[2] / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


COMMAND_LINE = "command line"


def load_config(
    name: str | None,
    flags: dict[str, Any] | None = None,
    sets: list[str] | None = None,
    given_in: str = COMMAND_LINE,
) -> ConversionConfig:
    """The config `name` (or a YAML file, or the defaults) with flags and `--set` applied.

    Args:
        given_in: where name, flags and sets stand, for the errors.

    Raises:
        ConfigError: one line for every wrong key and value.
    """
    return _load(ConversionConfig, "configs", name, flags, sets, given_in)


def load_recipe(
    name: str,
    flags: dict[str, Any] | None = None,
    sets: list[str] | None = None,
    given_in: str = COMMAND_LINE,
) -> Recipe:
    """The recipe `name` (or a YAML file) with flags and `--set` applied; as `load_config`."""
    return _load(Recipe, "recipes", name, flags, sets, given_in)


def _load(schema: type, kind: str, name: str | None, flags: dict | None, sets: list[str] | None, given_in: str):
    data: dict[str, Any] = {}
    origin, given = given_in, []
    if name is not None:
        path = _find(kind, name)
        origin = str(path)
        data = read_yaml(path)
    # stages come last: what they say themselves stands
    for key, value in sorted((flags or {}).items(), key=lambda item: item[0] == "stages"):
        if value is not None:
            if value != data.get(key):
                data.pop(f"{key}_options", None)  # another mixer or mix has other options
            _give(data, key, value)
            given.append(key)
    for item in sets or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: got '{item}', allowed is key=value, for example --set window=128")
        try:
            _give(data, key, _scalar(text))
            given.append(key)
        except yaml.YAMLError:
            raise ConfigError(f"--set: got '{item}', whose value is not valid YAML") from None
    lines: dict[str, None] = {}
    while True:
        try:
            settings = schema.model_validate(data)
            break
        except ValidationError as error:
            found = error.errors()
            lines |= dict.fromkeys(line for item in found for line in explain(item, schema).splitlines())
            # what is checked last is only checked where all before it holds, so the wrong keys go and it is looked at again
            if not any([_removed(data, item["loc"]) for item in found]):
                break
    if lines:
        of_these = tuple(f"{key}{end}" for key in given for end in (":", "."))
        places = [given_in if line.startswith(of_these) else origin for line in lines]
        raise ConfigError("\n".join(f"{place}: {line}" for place, line in zip(places, lines)))
    return settings


def _removed(data: Any, location: Sequence) -> bool:
    """Takes the value at `location` out of nested dicts and lists; whether there was one."""
    *parents, last = location or [None]
    for key in parents:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return False
    if isinstance(data, dict) and last in data:
        del data[last]
        return True
    return False


def _find(kind: str, name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"--{kind[:-1]}: no file '{name}'")
        return Path(name)
    known = packaged(kind)
    if name not in known:
        raise ConfigError(
            f"--{kind[:-1]}: got '{name}', allowed are {', '.join(known)} or a .yaml file{nearest(name, known)}"
        )
    return known[name]


def _scalar(text: str) -> Any:
    return yaml.load(text, _Loader) if text else ""


def _give(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a key of the file; a mapping lies over what is there, and what a recipe's stages say otherwise goes."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _give(data, f"{dotted}.{key}", item)
        return
    _assign(data, dotted, value)
    stages = data.get("stages")
    if isinstance(stages, list) and stages and dotted == "loss.kind":
        raise ConfigError("loss.kind: in a recipe of stages their names decide it; set the stages themselves")
    for stage in stages if isinstance(stages, list) else []:
        _removed(stage, dotted.split("."))


def _assign(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {dotted}: '{parent}' is a value, not a group of keys")
    data[last] = value


def explain(item: dict, schema: type[BaseModel]) -> str:
    """One line for one pydantic error: the key, what was got, what is allowed, the nearest name."""
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        group = schema
        for part in item["loc"][:-1]:
            if isinstance(part, int):
                continue  # the group is what the list holds
            group = LayerSettings if group is dict else group.model_fields[part].annotation
            # of a list or of something that may be absent it is what stands inside
            group = get_args(group)[0] if get_origin(group) in (list, UnionType) else get_origin(group) or group
        return unknown_key(dotted, location[-1], group.model_fields)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{dotted}: missing, and has no default"
    if not location:
        return message
    shown = repr(item["input"])
    return f"{dotted}: got {shown if len(shown) < 80 else shown[:77] + '...'}; {message[0].lower() + message[1:]}"
