"""Name outputs under ./linearized, the default output folder, and find the newest one there."""

import re
from pathlib import Path

from linearize.checkpoint.json_file import read_object
from linearize.checkpoint.names import MANIFEST
from linearize.errors import CheckpointError, ConfigError

OUTPUT_ROOT = Path("linearized")


def default_output(name: str, suffix: str) -> Path:
    """Return `linearized/<model>-<suffix>`, relative to the current folder."""
    stem = re.sub(r"[^\w.-]+", "-", name.split("/")[-1])
    return OUTPUT_ROOT / f"{stem}-{suffix}"


def newest_output() -> Path:
    """Return the most recently written checkpoint folder under ./linearized/.

    Raises:
        ConfigError: there is none.
    """
    return _newest_checkpoint(None, missing="none found")


def newest_conversion() -> Path:
    """Return the newest checkpoint folder under ./linearized/ that was converted and not yet finetuned.

    Raises:
        ConfigError: there is none.
    """
    return _newest_checkpoint("converted", missing="no conversion")


def _newest_checkpoint(kind: str | None, *, missing: str) -> Path:
    """Return the newest checkpoint folder under ./linearized/.

    Args:
        kind: the kind of checkpoint to look for (`Manifest.kind`); None for any.
        missing: words of the error if there is none.

    Raises:
        ConfigError: there is none.
    """
    manifests = [
        path
        for path in OUTPUT_ROOT.glob(f"*/{MANIFEST}")
        # hidden folders are unfinished or replaced ones
        if not path.parent.name.startswith(".") and (kind is None or _kind(path) == kind)
    ]
    if not manifests:
        raise ConfigError(f"MODEL: none given and {missing} under ./linearized/; run `linearize convert MODEL` first")
    return max(manifests, key=lambda path: path.stat().st_mtime_ns).parent


def _kind(manifest: Path) -> str | None:
    """Return the kind of a checkpoint; None for a damaged one, which must not hide the others."""
    try:
        return read_object(manifest).get("kind")
    except CheckpointError:
        return None
