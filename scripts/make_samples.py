"""Make the package's sample texts, linearize/data/sample.jsonl and sample-eval.jsonl, from a folder of parquet files.

    python scripts/make_samples.py ../shared/data/train

Only CC0 and public-domain sources go in. Training and evaluation text come from different works: the hash of a work
assigns it to one of them.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

TARGET = Path(__file__).resolve().parent.parent / "linearize" / "data"
# source prefix -> bytes of sample, bytes of sample-eval
SHARES = {
    "narrative/standardebooks/": (380_000, 90_000),
    "expository/standardebooks/": (260_000, 60_000),
    "web/18F": (130_000, 30_000),
    "web/GSA": (110_000, 25_000),
    "expository/factbook": (60_000, 15_000),
    "expository/sqlite.org docs": (60_000, 15_000),
    "expository/usnistgov": (30_000, 15_000),
}
# bytes of the longest document, so that no single one fills its source's share
LONGEST = 40_000


def main() -> None:
    """Choose documents for both samples, write them and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of parquet files with the columns text and source")
    folder = parser.parse_args().folder
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]
    rows.sort(key=text_hash)
    for name, for_evaluation in (("sample", False), ("sample-eval", True)):
        documents = choose(rows, for_evaluation)
        with open(TARGET / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        size = sum(len(document["text"].encode()) for document in documents)
        print(name, len(documents), "documents", size, "bytes")


def choose(rows: list[dict[str, Any]], for_evaluation: bool) -> list[dict[str, str]]:
    """Fill each source's share of one sample with its documents, in the order of `rows`; sort them by hash."""
    documents = []
    for prefix, shares in SHARES.items():
        remaining = shares[for_evaluation]
        for row in rows:
            size = len(row["text"].encode())
            fits = size <= min(remaining, LONGEST)
            if row["source"].startswith(prefix) and is_for_evaluation(row) == for_evaluation and fits:
                documents.append({"text": row["text"], "source": row["source"]})
                remaining -= size
    return sorted(documents, key=text_hash)


def text_hash(row: dict[str, Any]) -> bytes:
    """Return a key that shuffles rows the same way on every machine."""
    return hashlib.sha256(row["text"].encode()).digest()


def is_for_evaluation(row: dict[str, Any]) -> bool:
    """Return True for a fifth of the works. A book, cut into chapters, is one work; elsewhere each page is one."""
    is_book = "/standardebooks/" in row["source"]
    work = row["source"] if is_book else row["text"]
    return hashlib.sha256(work.encode()).digest()[0] % 5 == 0


if __name__ == "__main__":
    main()
