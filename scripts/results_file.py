"""Write the JSON files of scripts/results: few lines, so that a person can read them and a diff shows what changed."""

import json
from pathlib import Path
from typing import Any

# a metric with its five models is one line of about 500 characters, a recipe one of 900
WIDTH = 1000
# more than any of these measurements can tell
DIGITS = 9


def write_results(path: Path, document: Any) -> None:
    """Write a JSON document to `path`, each value that fits into WIDTH characters on one line."""
    path.write_text(layout(rounded(document)) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Return the document with each of its floats rounded to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def layout(value: Any, depth: int = 0) -> str:
    """Return the JSON text of a value, broken into one line an item where it would not fit into WIDTH characters."""
    text = json.dumps(value)
    if not isinstance(value, dict | list) or (len(text) <= WIDTH and depth):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {layout(item, depth + 1)}" for key, item in value.items()]
    else:
        items = [layout(item, depth + 1) for item in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    return opening + inner + ("," + inner).join(items) + outer + closing
