"""What running a base model found, kept under ~/.cache/linearize (or XDG_CACHE_HOME) for whoever asks again."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.writing import write_json


def kept(kind: str, key: dict[str, Any], compute: Callable[[], Any], found: Callable[[], None] = lambda: None) -> Any:
    """The JSON-able value of `key`: what an earlier call kept, else `compute()`.

    A damaged file is computed again and replaced; where nothing can be written nothing is kept.

    Args:
        kind: a folder of its own.
        key: everything that decides the value.
        found: hears that nothing needs computing.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linearize" / kind
    path = folder / f"{fingerprint_of(key)}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        value = json.loads(path.read_bytes())["value"]
        found()
        return value
    value = compute()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "value": value})
    return value
