"""Read JSON files of unknown origin: bounded in size and depth, every fault an error that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, one_line

# bytes of a file; vocabularies of tokenizers are the largest JSON files of a checkpoint, and are not read here
JSON_LIMIT = 64 << 20
# numbers that fit into 64 bits, as every count and size does
LARGEST = 2**63 - 1
# digits of a number; transformers writes 10^30 for "no limit"
MOST_DIGITS = 40


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a JSON file.

    Args:
        pairs: makes the value of an object of its key-value pairs; None: a dict.

    Raises:
        CheckpointError: it cannot be read, is too large, or is not valid JSON.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'is no plain file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON, at most {JSON_LIMIT:,} are read")
        return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=pairs, parse_int=_integer)
    except RecursionError:
        raise CheckpointError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: as `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got a {type(value).__name__}, allowed is an object")
    return value


def _integer(digits: str) -> int:
    """Return an integer, and refuse one that could only do harm."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {digits[:20]}… has {len(digits)} digits")
    return int(digits)
