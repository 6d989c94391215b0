"""SHA-256 of files and of small things."""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256(content: Path | bytes | list[bytes]) -> str:
    """Hex digest of a file, of bytes, or of pieces (each preceded by its length, so that joins cannot collide)."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for piece in content if isinstance(content, list) else [content]:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def fingerprint_of(value: Any) -> str:
    """Hex digest of a JSON-able value, keys in any order."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())
