"""Prove that a conversion and its logits are the same in a git revision and in the working tree, bit for bit.

    python scripts/compare_revisions.py REVISION MODEL
    python scripts/compare_revisions.py v0.1.0 model.gguf --config smollm2-135m

1. Export REVISION to a temporary folder.
2. Convert MODEL with the code of either tree, in processes and with result caches of their own. Flags that this script
   does not know go to `linearize convert`.
3. Compare the files of the two conversions, those of NOT_COMPARED and the fields of IGNORED_KEYS apart.
4. Load each conversion with its own code, in float32 on one thread, and compare the logits of a full forward and of
   cached decoding.
5. Print a table. Exit code 1: something moved.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "linearize.json"
# files that may differ, and why
NOT_COMPARED = {"modeling_linearized.py": "code, whose definitions may change places", "README.md": "prose"}
# keys of linearize.json that may differ, wherever they stand
IGNORED_KEYS = {"versions", "seconds"}
# tokens past the longest window, so that the recurrent branch of every layer takes part
PAST_WINDOW = 128
# runs in a process of its own with the code of either tree: FOLDER TOKENS OUT
LOGITS = """
import sys
import linearize
import torch
from transformers import AutoModelForCausalLM

folder, tokens, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    full = model(ids, use_cache=False).logits
    state, pieces = {}, []
    for piece in ids.split([tokens // 2, tokens - tokens // 2 - 8, *[1] * 8], dim=1):
        result = model(piece, use_cache=True, **state)
        name = "cache" if "cache" in result else "past_key_values"  # transformers renamed it in 5.24
        state = {name: result[name]}
        pieces.append(result.logits)
torch.save({"full forward": full, "cached decoding": torch.cat(pieces, 1)}, out)
"""


def main() -> None:
    """Convert with both trees, compare, print the table and exit with 1 if anything moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="git revision to compare the working tree with")
    parser.add_argument("model", help="base model: folder, .gguf file or hub id")
    arguments, convert_flags = parser.parse_known_args()
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model
    with tempfile.TemporaryDirectory(prefix="compare-revisions-") as temporary:
        work = Path(temporary)
        export_revision(arguments.revision, work / "old" / "code")
        trees = {"old": work / "old" / "code", "new": ROOT}
        students = {name: convert(tree, model, work / name, convert_flags) for name, tree in trees.items()}
        rows = compare_files(students["old"], students["new"])
        tokens = tokens_past_window(students["old"])
        logits = {name: logits_of(tree, students[name], tokens, work / name) for name, tree in trees.items()}
        for kind, old in logits["old"].items():
            rows.append((f"logits, {kind}, {tokens} tokens", compare_tensors(old, logits["new"][kind])))
    print(table(rows))
    moved = [name for name, verdict in rows if verdict.startswith("MOVED")]
    print(f"{len(moved)} of {len(rows)} moved between {arguments.revision} and the working tree")
    sys.exit(bool(moved))


def export_revision(revision: str, folder: Path) -> None:
    """Write the tracked files of `revision` into `folder`."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
    if archive.returncode:
        sys.exit(f"REVISION: git cannot export '{revision}': {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def run_with(tree: Path, arguments: list[str], work: Path) -> None:
    """Run Python with the package of `tree`, one thread, and the result cache in `work`; exit if it fails."""
    hub_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    environment = {"HF_HOME": str(hub_cache), **os.environ}  # downloads may be shared, results may not
    environment |= {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    process = subprocess.run([sys.executable, *arguments], cwd=work, env=environment, stdout=subprocess.DEVNULL)
    if process.returncode:
        sys.exit(f"exit code {process.returncode} with the code of {tree}")


def convert(tree: Path, model: str, work: Path, flags: list[str]) -> Path:
    """Convert `model` with the code of `tree`; return the folder of the checkpoint."""
    work.mkdir(exist_ok=True)
    run_with(tree, ["-m", "linearize", "convert", model, "-o", str(work / "student"), "--no-verify", *flags], work)
    return work / "student"


def compare_files(old: Path, new: Path) -> list[tuple[str, str]]:
    """Return a verdict for every file of two conversions."""
    rows = []
    paths = {path.relative_to(folder) for folder in (old, new) for path in folder.rglob("*") if path.is_file()}
    for path in sorted(paths):
        name, files = path.as_posix(), [folder / path for folder in (old, new)]
        if not all(file.is_file() for file in files):
            verdict = "MOVED: only in " + ("the working tree" if files[1].is_file() else "the revision")
        elif name == MANIFEST:
            verdict = compare_documents(*(json.loads(file.read_bytes()) for file in files))
        elif files[0].read_bytes() == files[1].read_bytes():
            verdict = "same bytes"
        elif name in NOT_COMPARED:
            verdict = f"not compared: {NOT_COMPARED[name]}"
        else:
            verdict = "MOVED: other bytes"
        rows.append((name, verdict))
    return rows


def compare_documents(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the verdict for two manifests; the fields of IGNORED_KEYS may differ."""
    old_values, new_values = flatten(old), flatten(new)
    moved = [key for key in {**old_values, **new_values} if old_values.get(key) != new_values.get(key)]
    if moved:
        return f"MOVED: {len(moved)} fields, first {moved[0]}"
    return f"same {len(old_values)} fields ({', '.join(sorted(IGNORED_KEYS))} apart)"


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of a JSON document by their dotted paths, without IGNORED_KEYS."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    leaves: dict[str, Any] = {}
    for key, item in items:
        if key not in IGNORED_KEYS:
            leaves |= flatten(item, f"{path}.{key}".removeprefix("."))
    return leaves


def tokens_past_window(student: Path) -> int:
    """Return a number of tokens that leaves every window, as far as the model's positions go."""
    config = json.loads((student / "config.json").read_bytes())
    longest = max(layer["window"] + layer["sinks"] for layer in config["linearize"]["layers"])
    return min(longest + PAST_WINDOW, config.get("max_position_embeddings") or sys.maxsize)


def logits_of(tree: Path, student: Path, tokens: int, work: Path) -> dict[str, torch.Tensor]:
    """Compute a checkpoint's logits with the code of `tree`: a full forward, and cached decoding."""
    run_with(tree, ["-c", LOGITS, str(student), str(tokens), str(work / "logits.pt")], work)
    return torch.load(work / "logits.pt")


def compare_tensors(old: torch.Tensor, new: torch.Tensor) -> str:
    """Return the verdict for two tensors of logits."""
    if old.shape != new.shape:
        return f"MOVED: shape {list(old.shape)} became {list(new.shape)}"
    if torch.equal(old, new):
        return f"same bits, {list(old.shape)}"
    return f"MOVED: by up to {(old - new).abs().max().item():.2e}"


def table(rows: list[tuple[str, str]]) -> str:
    """Render names and verdicts as two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {verdict}" for name, verdict in rows)


if __name__ == "__main__":
    main()
