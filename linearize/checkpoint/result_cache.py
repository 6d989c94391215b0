"""Cache results of running a base model on disk, under ~/.cache/linearize (or XDG_CACHE_HOME)."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.writing import write_json

# a week
KEPT_SECONDS = 7 * 24 * 3600


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
    shutil.rmtree(_unfinished(kind, key), ignore_errors=True)
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


def unfinished_folder(kind: str, key: dict[str, Any]) -> Path:
    """Return the folder for what a computation leaves when it is interrupted. `cached_on_disk` removes it in the end.

    What nobody has gone on with for KEPT_SECONDS is removed.
    """
    folder = _unfinished(kind, key)
    with contextlib.suppress(OSError):
        for other in folder.parent.iterdir():
            if time.time() - other.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return folder


def _unfinished(kind: str, key: dict[str, Any]) -> Path:
    return _cache_folder() / "unfinished" / f"{kind}-{fingerprint_of(key)}"


def _path(kind: str, key: dict[str, Any]) -> Path:
    return _cache_folder() / kind / f"{fingerprint_of(key)}.json"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linearize"
