"""Makes the package's sample texts, linearize/data/sample.jsonl and sample-eval.jsonl, from a folder of parquet files.

    python scripts/make_samples.py ../shared/data/train

Only CC0 and public-domain sources are taken. Training and evaluation text come from different works: a work (the
source field) is assigned to one of them by its hash.
"""

import hashlib
import json
import sys
from pathlib import Path

import pyarrow.parquet as parquet

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
LONGEST = 40_000


def main() -> None:
    folder = Path(sys.argv[1])
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]
    rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
    target = Path(__file__).resolve().parent.parent / "linearize" / "data"
    for position, name in enumerate(("sample", "sample-eval")):
        chosen = []
        for prefix, shares in SHARES.items():
            left = shares[position]
            for row in rows:
                size = len(row["text"].encode())
                if row["source"].startswith(prefix) and _is_eval(row) == bool(position) and size <= min(left, LONGEST):
                    chosen.append({"text": row["text"], "source": row["source"]})
                    left -= size
        chosen.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
        with open(target / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        print(name, len(chosen), "documents", sum(len(row["text"].encode()) for row in chosen), "bytes")


def _is_eval(row: dict) -> bool:
    """A fifth of the works. A book is one work, cut into chapters; of other sources every page is one."""
    is_book = "/standardebooks/" in row["source"]
    work = row["source"] if is_book else row["text"]
    return hashlib.sha256(work.encode()).digest()[0] % 5 == 0


if __name__ == "__main__":
    main()
