"""Cache results of running a base model on disk, under ~/.cache/linearize (or XDG_CACHE_HOME)."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.writing import write_json


def cached_on_disk(
    kind: str,
    key: dict[str, Any],
    compute: Callable[[], Any],
    on_hit: Callable[[], None] = lambda: None,
    parse: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Return the value for `key`: an earlier call's from disk, else that of `compute()`, which is then stored.

    A damaged file is computed again and replaced. If the folder cannot be written, nothing is stored.

    Args:
        kind: name of the subfolder for this kind of value.
        key: everything that decides the value.
        compute: returns the value as JSON.
        on_hit: called when the value comes from disk.
        parse: makes the value of its JSON.
    """
    value = read_cached(kind, key, parse)
    if value is not None:
        on_hit()
        return value
    stored = compute()
    write_cached(kind, key, stored)
    return parse(stored)


def read_cached(kind: str, key: dict[str, Any], parse: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return the value that is stored for `key`; None if there is none, or its file is damaged.

    Args:
        parse: makes the value of its JSON. What it raises on JSON of another form counts as damage.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        return parse(json.loads(_path(kind, key).read_bytes())["value"])
    return None


def write_cached(kind: str, key: dict[str, Any], value: Any) -> None:
    """Store a JSON-able value other than None for `key`, if the folder can be written."""
    path = _path(kind, key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "value": value})


def _path(kind: str, key: dict[str, Any]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linearize" / kind
    return folder / f"{fingerprint_of(key)}.json"
