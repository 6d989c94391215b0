"""Compute SHA-256 fingerprints of files, JSON values and tokenizers."""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256(content: Path | bytes | list[bytes]) -> str:
    """Return a SHA-256 digest of a file, of bytes, or of a list of pieces, in hex digits.

    A file's digest is the one that `sha256sum` prints. Bytes have another: each piece is preceded by its length, so
    that lists which differ only in where they are cut have different digests. A file's digest is therefore not that of
    its bytes. Manifests and caches record all of them, so none may change.
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
    """Return the digest of a transformers tokenizer's rules; None without a tokenizer.

    The rules are the vocabulary, the splitting and the special tokens. A tokenizer that cannot state them is told by
    its vocabulary and by what it makes of a short text.
    """
    if tokenizer is None:
        return None
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return fingerprint_of([tokenizer.get_vocab(), tokenizer("a b").input_ids])
    rules = json.loads(backend.to_str())
    # truncation and padding are those of the tokenizer's last call, and no rules
    return fingerprint_of({**rules, "truncation": None, "padding": None})


def fingerprint_of(value: Any) -> str:
    """Return the hex digest of a JSON-able value. The order of keys does not matter."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())
