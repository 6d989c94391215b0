"""Compute SHA-256 fingerprints of files, JSON values and tokenizers."""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256(content: Path | bytes | list[bytes]) -> str:
    """Return the hex digest of a file, of bytes, or of a list of pieces.

    Each piece is preceded by its length, so that two ways to cut the same bytes have two digests.
    """
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for piece in content if isinstance(content, list) else [content]:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Return the digest of a transformers tokenizer's rules: vocabulary, splitting, special tokens. None gives None."""
    if tokenizer is None:
        return None
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return fingerprint_of([tokenizer.get_vocab(), tokenizer("a b").input_ids])
    rules = json.loads(backend.to_str())
    return fingerprint_of({**rules, "truncation": None, "padding": None})  # the last call set these two


def fingerprint_of(value: Any) -> str:
    """Return the hex digest of a JSON-able value. The order of keys does not matter."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())
