"""Check the header of a GGUF file before a reader follows its counts (ggml-org/ggml, docs/gguf.md)."""

import struct
from pathlib import Path
from typing import BinaryIO

from linearize.errors import CheckpointError

# bytes of a value by its type's number; strings (8) and arrays (9) say their own length
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# dimensions of a tensor, and bytes of a name
MOST_DIMENSIONS, LONGEST_NAME = 4, 1 << 16
VERSIONS = (2, 3)


def check_gguf_header(path: Path) -> None:
    """Walk through the header and refuse a count or a length that the file has no room for.

    Raises:
        CheckpointError: it is no GGUF file, of another version, or damaged.
    """
    with open(path, "rb") as file:
        walk = _Walk(path, file, path.stat().st_size)
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file, or damaged")
        if (version := walk.number("<I")) not in VERSIONS:
            raise CheckpointError(f"{path}: GGUF version {version}, readable are {VERSIONS[0]} and {VERSIONS[1]}")
        tensors, keys = walk.count(1), walk.count(1)
        for _ in range(keys):
            walk.string(LONGEST_NAME)
            walk.value(walk.number("<I"))
        for _ in range(tensors):
            walk.string(LONGEST_NAME)
            if (dimensions := walk.number("<I")) > MOST_DIMENSIONS:
                raise walk.damage(f"a tensor of {dimensions} dimensions")
            walk.skip(8 * dimensions + 4 + 8)  # lengths, type, place


class _Walk:
    """A walk through a file that never leaves it."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size

    def damage(self, what: str) -> CheckpointError:
        """Return the error of a damaged header."""
        return CheckpointError(f"{self.path}: damaged or truncated header ({what} at byte {self.file.tell():,})")

    def skip(self, length: int) -> None:
        """Go on by `length` bytes, if there are as many."""
        if length > self.size - self.file.tell():
            raise self.damage(f"{length:,} bytes are asked for")
        self.file.seek(length, 1)

    def number(self, form: str) -> int:
        """Read a number."""
        content = self.file.read(struct.calcsize(form))
        if len(content) < struct.calcsize(form):
            raise self.damage("its end")
        return int(struct.unpack(form, content)[0])

    def count(self, width: int) -> int:
        """Read a count of things of at least `width` bytes."""
        count = self.number("<Q")
        if count * width > self.size - self.file.tell():
            raise self.damage(f"a count of {count:,}")
        return count

    def string(self, longest: int | None = None) -> None:
        """Go past a string."""
        length = self.count(1)
        if longest is not None and length > longest:
            raise self.damage(f"a name of {length:,} bytes")
        self.skip(length)

    def value(self, kind: int, depth: int = 0) -> None:
        """Go past a value of a type."""
        if kind == STRING:
            self.string()
        elif kind == ARRAY and depth < 4:
            inner = self.number("<I")
            count = self.count(WIDTHS.get(inner, 8))
            if inner in WIDTHS:
                self.skip(count * WIDTHS[inner])
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in WIDTHS:
            self.skip(WIDTHS[kind])
        else:
            raise self.damage(f"a value of type {kind}")
