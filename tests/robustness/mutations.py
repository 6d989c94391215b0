"""Damage files in every way that a generator of random numbers comes upon: JSON values, bytes, lengths, encodings."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ESC, NUL = "\x1b[31mred", "a\0b"
# values that take the place of another; raw text where Python's own JSON cannot write it
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**25, -(2**40), 0.5, 1e308, -1e-300, "", "x",
    "1", "x" * 5000, ESC, NUL, "\n\n", "<script>", "../../etc/passwd", "/dev/zero", [], {}, [[]], [1, 2, 3], ["a"],
    {"a": 1}, {"": None}, "‮abc", "💥",
]  # fmt: skip
RAW = ["9" * 400, "-" + "9" * 400, "NaN", "Infinity", "-Infinity", "1e999", "[" * 3000 + "]" * 3000]
PLACEHOLDER = "@@raw@@"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths of all values in a JSON document, the document's own first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated_json(text: str, rng: random.Random) -> str:
    """Return a JSON document in which one value, one key or one place is another."""
    document = json.loads(text)
    found = [path for path in places(document) if len(path) <= 5][:400]
    path = rng.choice(found)
    document = copy.deepcopy(document)
    if not path:
        return rng.choice(["", "null", "[]", "{}", "1", '"x"', "[" * 100_000, text + "x", text * 2, "{" + text])
    *above, key = path
    holder = document
    for step in above:
        holder = holder[step]
    kind = rng.choice(["value", "value", "value", "raw", "delete", "rename", "copy", "duplicate"])
    if kind == "value":
        holder[key] = rng.choice(VALUES)
    elif kind == "raw":
        holder[key] = PLACEHOLDER
        return json.dumps(document).replace(json.dumps(PLACEHOLDER), rng.choice(RAW))
    elif kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(["", "x", ESC, str(key).upper(), "linearize"])] = holder.pop(key)
    elif kind == "copy":
        other = document
        for step in rng.choice(found):
            other = other[step] if isinstance(other, dict | list) else other
        holder[key] = copy.deepcopy(other)
    else:
        line = f"{json.dumps(key)}: "
        return text.replace(line, f"{line}1, {line}", 1)
    return json.dumps(document)


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes that are cut, flipped, doubled, or in another encoding."""
    kind = rng.choice(["cut", "flip", "flip", "flip many", "empty", "grow", "zeros", "utf-16", "bom", "swap"])
    if kind == "cut":
        return content[: rng.randrange(len(content) + 1)]
    if kind in ("flip", "flip many"):
        damaged = bytearray(content)
        limit = len(content) if rng.random() < 0.5 else min(len(content), 4096)
        for _ in range(1 if kind == "flip" else 20):
            if damaged:
                damaged[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    if kind == "grow":
        return content + rng.randbytes(rng.randrange(1, 100))
    if kind == "zeros":
        return bytes(len(content))
    if kind == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    if kind == "bom":
        return b"\xef\xbb\xbf" + content
    if kind == "swap":
        middle = len(content) // 2
        return content[middle:] + content[:middle]
    return b""


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file whose JSON header was changed; its length field is right again, or not."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = mutated_json(content[8 : 8 + length].decode(), rng).encode()
    except (ValueError, UnicodeDecodeError):
        return mutated_bytes(content, rng)
    stated = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**40, 2**63])
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def mutate(path: Path, rng: random.Random) -> None:
    """Replace a file by a damaged one. It is never written through a link."""
    content = path.read_bytes()
    forms: list[Callable[[bytes, random.Random], bytes]] = [mutated_bytes]
    if path.suffix == ".json":
        forms += [lambda raw, rng: mutated_json(raw.decode(), rng).encode("utf-8", "surrogatepass")] * 4
    if path.suffix == ".safetensors":
        forms += [mutated_header] * 2
    damaged = rng.choice(forms)(content, rng)
    path.unlink()
    path.write_bytes(damaged)
