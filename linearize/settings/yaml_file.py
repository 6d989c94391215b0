"""Read YAML files strictly: no duplicate keys, no surprising types."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from linearize.errors import ConfigError, one_line


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML, in which 18:2 is no number of base 60, and a key that stands twice, of which YAML keeps the second, a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, (at, _) in zip(keys, node.value):
            if keys.count(key) > 1 and key != "<<":
                raise yaml.YAMLError(f"key '{key}' stands twice{at.start_mark}")
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "int": r"^[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
}


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises: ConfigError: it is none, or a key stands twice."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a {type(data).__name__} at the top, allowed is a mapping of keys")
    return data
