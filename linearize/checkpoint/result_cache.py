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
    kind: str, key: dict[str, Any], compute: Callable[[], Any], on_hit: Callable[[], None] = lambda: None
) -> Any:
    """Return the JSON-able value for `key`: an earlier call's from disk, else `compute()`, which is then stored.

    A damaged file is computed again and replaced. If the folder cannot be written, nothing is stored.

    Args:
        kind: name of the subfolder for this kind of value.
        key: everything that decides the value.
        on_hit: called when the value comes from disk.
    """
    value = read_cached(kind, key)
    if value is not None:
        on_hit()
        return value
    value = compute()
    write_cached(kind, key, value)
    return value


def read_cached(kind: str, key: dict[str, Any]) -> Any:
    """Return the value that is stored for `key`; None if there is none, or its file is damaged."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads(_path(kind, key).read_bytes())["value"]
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
