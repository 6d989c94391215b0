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


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Of what a transformers tokenizer makes of text, its vocabulary and what it puts before and behind; None for None."""
    if tokenizer is None:
        return None
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return fingerprint_of([tokenizer.get_vocab(), tokenizer("a b").input_ids])
    rules = json.loads(backend.to_str())
    return fingerprint_of({**rules, "truncation": None, "padding": None})  # those two are of the last call


def fingerprint_of(value: Any) -> str:
    """Hex digest of a JSON-able value, keys in any order."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())
