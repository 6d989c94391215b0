"""The folder of outputs that need no name, ./linearized: what is written there, and what is the newest."""

import json
import re
from pathlib import Path

from linearize.checkpoint.names import MANIFEST
from linearize.errors import ConfigError

OUTPUT_ROOT = Path("linearized")


def default_output(name: str, suffix: str) -> Path:
    """`linearized/<model>-<suffix>`, under the current folder."""
    stem = re.sub(r"[^\w.-]+", "-", name.split("/")[-1])
    return OUTPUT_ROOT / f"{stem}-{suffix}"


def newest_output() -> Path:
    """The most recently written checkpoint under ./linearized/.

    Raises:
        ConfigError: there is none.
    """
    return _newest("", "none found")


def newest_conversion() -> Path:
    """The newest converted, not yet finetuned, checkpoint under ./linearized/. Errors as above."""
    return _newest("converted", "no conversion")


def _newest(kind: str, none: str) -> Path:
    found = [
        path
        for path in OUTPUT_ROOT.glob(f"*/{MANIFEST}")
        if not path.parent.name.startswith(".") and (not kind or _kind(path) == kind)
    ]
    if not found:
        raise ConfigError(f"MODEL: none given and {none} under ./linearized/; run `linearize convert MODEL` first")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def _kind(manifest: Path) -> str | None:
    """Of a checkpoint; None of a damaged one."""
    try:
        return json.loads(manifest.read_bytes()).get("kind")
    except (ValueError, AttributeError):
        return None
