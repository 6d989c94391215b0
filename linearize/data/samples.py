"""Name the text that ships with the package. Its origin is stated in linearize/data/SOURCES.md."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
SAMPLES = {"sample": _FOLDER / "sample.jsonl", "sample-eval": _FOLDER / "sample-eval.jsonl"}
