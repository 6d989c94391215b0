"""Stream rows from files of text and JSON, compressed or not, with a bound on what is in memory at once."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from linearize.errors import ConfigError, one_line

# characters of a text file that are one document and in memory at once
LONGEST_TEXT = 4 * 1024**2
# characters of a row of JSON, and of a file that is one JSON array
LONGEST_ROW, LONGEST_ARRAY = 16 * 1024**2, 64 * 1024**2


def _open_zstandard(path: Path, mode: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"{path}: .zst files need zstandard (pip install zstandard)") from None
    return zstandard.open(path, mode)


OPENERS: dict[str, Callable[[Path, str], IO[bytes]]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".zst": _open_zstandard,
}


def _open_text(path: Path) -> TextIO:
    """Open a file as UTF-8 text, without the compression that its suffix names."""
    opener = OPENERS.get(path.suffix)
    raw = open(path, "rb") if opener is None else opener(path, "rb")  # noqa: SIM115
    return io.TextIOWrapper(raw, encoding="utf-8", newline="")


def text_documents(path: str) -> Iterator[dict[str, str]]:
    """Yield the documents of a text file: all of it, or pieces of LONGEST_TEXT characters that end with a line."""
    with _open_text(Path(path)) as file:
        while piece := file.read(LONGEST_TEXT):
            yield {"text": piece + file.readline(LONGEST_TEXT)}


def json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON objects, one a line, or of one array of objects.

    Raises:
        ValueError: something else stands there, or is longer than is kept in memory.
    """
    with _open_text(Path(path)) as file:
        first = file.readline(LONGEST_ROW)
        while first and not first.strip():
            first = file.readline(LONGEST_ROW)
        if first.lstrip().startswith("["):
            yield from _array(first, file)
            return
        if first.strip() == "{":  # one object over several lines
            first = (first + file.read(LONGEST_ARRAY)).replace("\r", " ").replace("\n", " ")
        number = 0
        while first:
            if len(first) >= LONGEST_ROW and not first.endswith("\n"):
                raise ValueError(f"row {number} is longer than {LONGEST_ROW:,} characters")
            if first.strip():
                yield _row(first, number)
                number += 1
            first = file.readline(LONGEST_ROW)


def _array(start: str, file: TextIO) -> Iterator[dict[str, Any]]:
    text = start + file.read(LONGEST_ARRAY - len(start) + 1)
    if len(text) > LONGEST_ARRAY:
        raise ValueError(
            f"is one JSON array of more than {LONGEST_ARRAY:,} characters, which would have to be in memory at once; "
            "write one object a line (.jsonl)"
        )
    rows = _parsed(text, "the array")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}, allowed are objects")
        yield row


def _row(line: str, number: int) -> dict[str, Any]:
    row = _parsed(line, f"row {number}")
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is a {type(row).__name__}, allowed are objects")
    return row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({one_line(error)})") from None
