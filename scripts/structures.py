"""Convert, finetune and evaluate one real model with every mixer, by the tool's own commands, and make one table.

    python scripts/structures.py run MODEL --work FOLDER [--only gla,kda]
    python scripts/structures.py render --work FOLDER

`run` measures, one at a time, the mixers that neither FOLDER nor scripts/results/structures.json has. Stopped and
started again, it resumes. `render` adds the rows of FOLDER to that file, and writes the table of
scripts/results/structures.md.

All share window 256 and 4 sinks on every head, the mix `outside` (hedgehog, vq: `joint`), the `lora` recipe, and the
text. Gates that have a normaliser get 64, so that they remember past the window.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from commands import linearize
from results_file import write_results

from linearize.checkpoint.student import Student
from linearize.mixers.registry import MIXERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "structures.json"
PAGE = ROOT / "scripts" / "results" / "structures.md"
BEGIN, END = "<!-- structures: scripts/structures.py render -->\n", "<!-- end of structures -->\n"
SETTINGS = {"hgrn2": ["--set", "mixer_options.lower_bound=0.97"], "hedgehog": ["--mix", "joint"]}
# the most telling mixers come first, since the whole list takes hours on a CPU
FIRST = ("gla", "gated_deltanet", "hedgehog", "kda", "deltanet", "mamba2", "linear")
# these conversions are not fitted to the base, and have further to go than the recipe's rates take them in few tokens
RATES = ("--seq-len", 1024, "--lr", 5e-4, "--set", "optimizer.mixer_lr=0.01")
# a rate that suits a few numbers a head is too high for whole feature maps
SLOWER = {name: ("--set", "optimizer.mixer_lr=0.001") for name in ("hedgehog",)}
LENGTHS, DISTANCE = (512, 2048), 1024


def main() -> None:
    """Measure the mixers that are missing, or render the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "render"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, required=True, help="folder of the runs, one subfolder a mixer")
        if name == "run":
            command.add_argument("model", help="base model: folder, .gguf file or hub id")
            command.add_argument("--only", help="mixers, separated by commas")
            command.add_argument("--tokens", type=int, default=51200, help="training budget of each mixer")
            command.add_argument("--eval-tokens", type=int, default=8192, help="tokens of text for each length")
    arguments = parser.parse_args()
    if arguments.command == "render":
        render(arguments.work)
        return
    names = arguments.only.split(",") if arguments.only else [*FIRST, *(n for n in MIXERS if n not in FIRST)]
    known = {row["structure"] for row in known_rows()}
    for name in names:
        if name not in known or arguments.only:
            measure(name, arguments)


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Convert, finetune and evaluate with one mixer, and write its row into its folder."""
    folder = arguments.work / name
    if (folder / "row.json").is_file():
        return
    settings: list[Any] = list(SETTINGS.get(name, []))
    if "gate_logit_normalizer" in MIXERS[name].options:
        settings += ["--set", "mixer_options.gate_logit_normalizer=64"]
    converted, tuned = folder / "converted", folder / "tuned"
    if not (tuned / "linearize.json").is_file():
        linearize(
            "convert", arguments.model, "-o", converted, "--mixer", name, "--keep-softmax", "none", "--window", 256,
            *settings, "--overwrite",
        )  # fmt: skip
        rates = [*RATES, *SLOWER.get(name, ())]
        linearize("finetune", converted, "-o", tuned, "--recipe", "lora", "--tokens", arguments.tokens, *rates)
    results = linearize(
        "eval", tuned, "--max-tokens", arguments.eval_tokens, "--lengths", ",".join(map(str, LENGTHS)),
        "--recall", DISTANCE, "--recall-rows", 4, "--only", "perplexity,recall",
    )  # fmt: skip
    manifest = Student.read(tuned).manifest
    row = {
        "structure": name,
        "settings": results["settings"],
        "parameters_added": manifest.parameters_added,
        "state_bytes": manifest.state_bytes,
        "training": manifest.finetune.model_dump(include={"tokens", "tokens_per_second"}),
        "metrics": {
            metric["name"]: {model: value["mean"] for model, value in metric["values"].items()}
            for metric in results["metrics"]
        },
        "data": results["data"],
        "versions": results["versions"],
    }
    (folder / "row.json").write_text(json.dumps(row, indent=1))
    for path in (converted, tuned):  # the weights are not needed any more, and take gigabytes
        shutil.rmtree(path)


def known_rows() -> list[dict[str, Any]]:
    """Return the rows of structures.json."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def render(work: Path) -> None:
    """Add the rows of `work` to structures.json, and replace the table between the two marks of the page."""
    by_name = {row["structure"]: row for row in known_rows()}
    by_name |= {path.parent.name: json.loads(path.read_text()) for path in sorted(work.glob("*/row.json"))}
    rows = list(by_name.values())
    if not rows:
        sys.exit(f"{work} holds no measured mixer")
    rows.sort(key=lambda row: row["metrics"][f"perplexity@{LENGTHS[-1]}"]["student"])
    write_results(RESULTS, rows)
    text = PAGE.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    assert mark, f"{PAGE} has no line {BEGIN!r}"
    PAGE.write_text(before + BEGIN + table(rows) + END + after, encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Render perplexity, recall, speed and sizes as Markdown, the best mixer first."""
    short, long = (f"perplexity@{length}" for length in LENGTHS)
    recall = f"recall@{DISTANCE}"
    lines = [
        f"| structure | start {LENGTHS[0]} | end {LENGTHS[0]} | start {LENGTHS[1]} | end {LENGTHS[1]} "
        f"| branch off {LENGTHS[1]} | recall {DISTANCE} | tokens/s | added | state, KiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = rows[0]["metrics"]
    for label, model in (("base", "base"), ("window + sinks", "window")):
        start_short, start_long, start_recall = (base[metric][model] for metric in (short, long, recall))
        lines.append(f"| *{label}* | {start_short:.2f} | | {start_long:.2f} | | | {start_recall:.2f} | | | |")
    for row in rows:
        m, rate = row["metrics"], row["training"]["tokens_per_second"]
        lines.append(
            f"| `{row['structure']}` | {m[short]['untrained']:.2f} | {m[short]['student']:.2f} | "
            f"{m[long]['untrained']:.2f} | {m[long]['student']:.2f} | {m[long]['branch_off']:.2f} | "
            f"{m[recall]['student']:.2f} | {f'{rate:.0f}' if rate else '–'} | {row['parameters_added']:,} | "
            f"{row['state_bytes'] / 1024:,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
