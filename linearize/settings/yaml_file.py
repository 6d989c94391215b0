"""Read YAML strictly: no duplicate keys, no surprising types.

Two rules differ from YAML 1.1. A pair such as 18:2 (a layer and a head) is text and not a number in base 60; 1e-3 is a
number. A key that stands twice, of which YAML keeps the second without a word, is an error.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import ConfigError, one_line

# numbers as YAML 1.2 and Python write them
_NUMBER_PATTERNS = {
    "int": r"^[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"""^[-+]?(?:
        [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        | \.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        | [0-9]+[eE][-+]?[0-9]+
        | \.(?:inf|Inf|INF)
        )$
        | ^\.(?:nan|NaN|NAN)$""",
}
# bytes of a file; a config or a recipe has a few thousand
YAML_LIMIT = 1 << 20
# values of a document, aliases written out
MOST_NODES = 100_000
# characters that a number can begin with
_NUMBER_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """A safe YAML loader with the two rules above, and a bound on what aliases expand to."""

    def get_single_node(self) -> yaml.Node | None:
        """Return the document's node; refuse one that repeats itself without end, or is no text."""
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > MOST_NODES:
            raise yaml.YAMLError(f"its aliases expand to more than {MOST_NODES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; refuse a key that stands twice. `<<` merges mappings and may."""
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name != "<<" and name in seen:
                raise yaml.YAMLError(f"key '{name}' stands twice{key.start_mark}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _without_numbers(resolvers: list[tuple[str, re.Pattern[str]]]) -> list[tuple[str, re.Pattern[str]]]:
    """Leave out the resolvers of YAML 1.1 for the types in _NUMBER_PATTERNS."""
    return [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _NUMBER_PATTERNS]


_Loader.yaml_implicit_resolvers = {
    first: _without_numbers(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _type, _pattern in _NUMBER_PATTERNS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(_pattern, re.VERBOSE), _NUMBER_STARTS)


def _expanded(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values that a node stands for, every alias written out.

    Args:
        counts: those of nodes that were counted; 0 for one that is being counted.
    """
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise yaml.YAMLError("an alias stands for what holds it")
        return counts[id(node)]
    counts[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        node.value.encode("utf-8")  # halves of characters are no text
        count = 1
    else:
        children = [child for entry in node.value for child in (entry if isinstance(entry, tuple) else (entry,))]
        count = 1 + sum(_expanded(child, counts) for child in children)
    counts[id(node)] = count
    return count


def parse_value(text: str) -> Any:
    """Parse a value as it would stand in a YAML file; no text at all is the empty string.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
    """
    if not text:
        return ""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except Exception as error:  # a tag on a value that is none of its kind: whatever its constructor raises
        raise yaml.YAMLError(f"{type(error).__name__}: {one_line(error)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is not valid YAML, holds no mapping, or repeats a key.
    """
    try:
        if (size := path.stat().st_size) > YAML_LIMIT:
            raise ConfigError(f"{path}: {size:,} bytes of YAML, at most {YAML_LIMIT:,} are read")
        text = path.read_text(encoding="utf-8")
        data = parse_value(text) if text else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a {type(data).__name__} at the top, allowed is a mapping of keys")
    return data
