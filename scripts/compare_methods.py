"""Compare methods of linearization on the same base, text, budget and measurements, by the tool's own commands.

    python scripts/compare_methods.py run MODEL --work FOLDER [--tokens 300K] [--only ours,liger] [--seeds 0,1,2]
    python scripts/compare_methods.py render

`run` measures rows: each is one `convert`, `finetune` and `eval`. Stopped and started again, it resumes. `--tokens 0`
leaves the training out; such rows stand beside the trained ones. A row with `beside` gets the window that makes its
cache as large as that of the conversion named there, at 32K tokens unless the row names another context. `render`
writes the table of scripts/results/methods.md from methods.json beside it.
"""

import argparse
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import linearize
from results_file import write_results

from linearize.checkpoint.student import Student
from linearize.settings.loading import load_config
from linearize.settings.recipe import parse_tokens

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "methods.json"
PAGE = ROOT / "scripts" / "results" / "methods.md"
BEGIN, END = "<!-- methods: scripts/compare_methods.py render -->\n", "<!-- end of methods -->\n"
CONFIG = "smollm2-135m"
# metrics that the table leaves out: perplexity in other units, and those without a ratio to the base
NOT_SHOWN = ("word_", "byte_", "bits_", "kl", "agreement", "passkey_loss")
CONTEXT = 32768
NO_BRANCH = ("--mixer", "none")
LORA = ("--recipe", "lora")


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        convert, finetune: flags of the two commands.
        beside: flags of the conversion whose cache, at `context` tokens, this one's is to equal; () for none.
    """

    label: str
    convert: tuple[str, ...]
    finetune: tuple[str, ...] = LORA
    beside: tuple[str, ...] = ()
    context: int = CONTEXT


OURS = ("--config", CONFIG)
PURE = (*OURS, "--keep-softmax", "none")
CONSTANT = ("--softmax-window", "2048")
LIGER, LIGER_RECIPE = ("--config", "liger"), ("--recipe", "liger")
LOLCATS, LOLCATS_RECIPE = ("--config", "lolcats"), ("--recipe", "lolcats")
# the heads of our config, for methods with a config of their own
TWELVE = ("--keep-softmax", load_config(CONFIG).keep_softmax)
# heads chosen by random copies alone, as before facts were asked for too
COPIES = ("--keep-softmax", "0:0,2:2,7:2,14:1,16:0,17:1,18:2,19:1,20:2,23:0,23:2,24:0")
# the heads that elimination leaves of the twelve in the config
SIX = ("--keep-softmax", "7:2,17:1,18:2,20:2,23:0,23:2")
# distilling the base from itself would be no control, since its loss is 0 from the first step
NEXT_TOKEN = (*LORA, "--set", "loss.kind=ce")
TRANSFER_FIRST = "stages=[{name: transfer, share: 0.1}, {name: distill, share: 0.9}]"
METHODS = {
    "control": Method("base, next-token loss on the same tokens", ("--keep-softmax", "all"), NEXT_TOKEN),
    "ours": Method("ours, 12 of 90 heads", OURS),
    "heads": Method("the same heads and a longer window, no recurrent branch", (*OURS, *NO_BRANCH), beside=OURS),
    "ours-copies": Method("ours, heads chosen by copies alone", (*OURS, *COPIES)),
    "heads-copies": Method(
        "those heads and a longer window, no recurrent branch", (*OURS, *COPIES, *NO_BRANCH), beside=(*OURS, *COPIES)
    ),
    "ours-2048": Method("ours, its 12 heads see 2,048 tokens: no cache grows", (*OURS, *CONSTANT)),
    "wide-2048": Method("window + sinks alone, those bytes", (*PURE, *NO_BRANCH), beside=(*OURS, *CONSTANT)),
    "wide": Method("window + sinks alone, the bytes of ours at 8K", (*PURE, *NO_BRANCH), beside=OURS, context=8192),
    "ours-0": Method("ours, no head", PURE),
    "window": Method("window + sinks alone, longer", (*PURE, *NO_BRANCH), beside=PURE),
    "ours-6": Method("ours, 5 of 90 heads, by gradient", (*OURS, "--keep-softmax", "recall:6%")),
    "ours-6-elimination": Method("ours, 6 of 90 heads, by elimination", (*OURS, *SIX)),
    # recorded when heads were scored by copies alone; a new run would score look-ups in text
    "ours-6-copies": Method("ours, 5 of 90 heads, by copies alone", (*OURS, "--keep-softmax", "recall:6%")),
    "ours-25": Method("ours, 25% of heads", (*OURS, "--keep-softmax", "recall:25%")),
    "liger": Method("Liger", LIGER, LIGER_RECIPE),
    "liger-heads": Method("Liger's layer, as many heads and bytes", (*LIGER, *COPIES), LIGER_RECIPE, OURS),
    "lolcats": Method("LoLCATs", LOLCATS, LOLCATS_RECIPE),
    "lolcats-heads": Method("LoLCATs' layer, as many heads and bytes", (*LOLCATS, *COPIES), LOLCATS_RECIPE, OURS),
    "lolcats-ours": Method("LoLCATs' layer, our heads, as many bytes", (*LOLCATS, *TWELVE), LOLCATS_RECIPE, OURS),
    "supra": Method("SUPRA", ("--config", "supra"), ("--recipe", "supra")),
    "ours-uncalibrated": Method("ours, not calibrated", (*OURS, "--no-calibrate")),
    "ours-transfer": Method("ours, attention transfer first", OURS, (*LORA, "--set", TRANSFER_FIRST)),
    "ours-ce": Method("ours, next-token loss", OURS, NEXT_TOKEN),
    "ours-half": Method("ours, half of the loss the next token's", OURS, (*LORA, "--set", "loss.ce_share=0.5")),
}  # fmt: skip


def main() -> None:
    """Measure the rows that are missing, or render the table."""
    arguments = parse_arguments()
    if arguments.command == "render":
        render()
        return
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.only.split(","):
            measure(name, seed, arguments)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="write the table")
    run = commands.add_parser("run", help="measure the rows that are missing")
    run.add_argument("model", help="base model: folder, .gguf file or hub id")
    run.add_argument("--work", type=Path, required=True, help="folder of the runs")
    run.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas")
    run.add_argument("--tokens", type=parse_tokens, default=300_000, help="training budget of every method")
    run.add_argument("--seeds", default="0", help="training seeds, separated by commas")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe key to set for every row")
    run.add_argument("--results", type=Path, default=RESULTS, help="JSON file to add rows to")
    run.add_argument("--data", help="training text for every method (default: each recipe's own)")
    run.add_argument("--text", type=Path, help="plain text for perplexity up to 2048 (default: sample-eval)")
    run.add_argument("--book", type=Path, help="one long text for perplexity at 8192 and passkeys")
    run.add_argument("--max-tokens", type=int, default=8192, help="tokens of text for each length")
    run.add_argument("--tasks", default="", help="lm-eval tasks, with --tasks-dir")
    run.add_argument("--tasks-dir", type=Path, help="folder of task files")
    run.add_argument("--task-limit", type=int, default=200, help="items of each task")
    arguments = parser.parse_args()
    if arguments.command == "run":
        for name in arguments.only.split(","):
            if name not in METHODS:
                parser.error(f"--only: got '{name}', allowed are {', '.join(METHODS)}")
    return arguments


def measure(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Convert, finetune and evaluate one method with one seed, and add its row to the results."""
    row_name = f"{name}-{arguments.tokens}" + (f"-seed{seed}" if seed else "")
    if row_name in known_rows(arguments.results):
        return
    method, folder = METHODS[name], arguments.work / row_name
    student = make_student(method, seed, folder, arguments)
    parts = evaluate(student, folder, arguments)
    manifest = Student.read(student).manifest
    training = manifest.finetune
    row = {
        "method": name,
        "label": method.label,
        "seed": seed,
        "tokens": training.tokens if training else 0,
        "seconds": training.seconds if training else 0.0,
        "settings": manifest.to_dict()["settings"],
        "recipe": training.recipe if training else None,
        "cache": manifest.cache_bytes[str(CONTEXT)],
        "state_bytes": manifest.state_bytes,
        "metrics": {metric["name"]: figures_of(metric) for part in parts for metric in part["metrics"]},
        "data": [part["data"] for part in parts],
        "versions": parts[0]["versions"],
        "command": shlex.join(["python", *sys.argv]),
    }
    write_results(arguments.results, {**known_rows(arguments.results), row_name: row})
    shutil.rmtree(folder)  # the weights are not needed any more, and take gigabytes


def make_student(method: Method, seed: int, folder: Path, arguments: argparse.Namespace) -> Path:
    """Convert and, with a budget, finetune; return the checkpoint. Steps that an earlier run finished are left."""
    converted, tuned = folder / "converted", folder / "tuned"
    if not (converted / "linearize.json").is_file():
        flags: list[Any] = [*method.convert]
        if method.beside:
            flags += ["--window", equal_window(arguments.model, method)]
        linearize("convert", arguments.model, "-o", converted, *flags)
    if not arguments.tokens:
        return converted
    if not (tuned / "linearize.json").is_file():
        data = ["--data", arguments.data] if arguments.data else []
        flags = [*method.finetune, *data, "--tokens", arguments.tokens, "--set", f"seed={seed}"]
        for change in arguments.set:
            flags += ["--set", change]
        linearize("finetune", converted, "-o", tuned, *flags)
    return tuned


def evaluate(student: Path, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the reports on short text and, with a book, on long text and passkeys."""
    flags: list[Any] = ["--max-tokens", arguments.max_tokens, "--lengths", "512,2048", "--recall", "64,256,1024"]
    flags += ["--only", "perplexity,recall" + (",tasks" if arguments.tasks else "")]
    if arguments.text:
        flags += ["--data", arguments.text]
    if arguments.tasks:
        flags += ["--tasks", arguments.tasks, "--tasks-dir", arguments.tasks_dir, "--task-limit", arguments.task_limit]
    reports = [linearize("eval", student, *flags, "-o", folder / "short")]
    if arguments.book:
        long_text = ("--only", "perplexity", "--lengths", "8192", "--max-tokens", "8192")
        passkeys = ("--only", "passkey", "--suite", "full")
        for name, flags in (("long", long_text), ("passkey", passkeys)):
            reports.append(linearize("eval", student, *flags, "--data", arguments.book, "-o", folder / name))
    return reports


def figures_of(metric: dict[str, Any]) -> dict[str, Any]:
    """Return a metric's means, errors, counts and tests, without its name and ratios, which the file's reader knows."""
    return {key: value for key, value in metric.items() if key not in ("name", "ratio") and value not in (None, "")}


def equal_window(model: str, method: Method) -> int:
    """Return the window that makes the cache of `method` as large as that of the conversion beside it.

    A cache grows evenly with the window, so two plans tell how fast.
    """
    target = bytes_at(linearize("plan", model, *method.beside), method.context)
    at_256, at_512 = (
        bytes_at(linearize("plan", model, *method.convert, "--window", window), method.context) for window in (256, 512)
    )
    return 256 + round((target - at_256) * 256 / (at_512 - at_256))


def bytes_at(plan: dict[str, Any], context: int) -> int:
    """Return the bytes of a student's cache at `context` tokens, which grow evenly beyond the windows."""
    (short, low), (long, high) = ((int(n), plan["cache_bytes"][n]["student"]) for n in ("4096", "32768"))
    return low + (high - low) * (context - short) // (long - short)


def known_rows(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the rows that are measured already, by name."""
    return json.loads(results.read_text()) if results.is_file() else {}


def render() -> None:
    """Replace the table between the two marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    assert mark, f"{PAGE} has no line {BEGIN!r}"
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(list(known_rows().values())) + END + after, encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Render ratios to the base as Markdown; lower is better for perplexity, higher for the rest."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"] if not name.startswith(NOT_SHOWN)))
    lines = [
        "| method | tokens | cache at 32K | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        label = row["label"] + (f" (seed {row['seed']})" if row["seed"] else "")
        cells = [label, f"{row['tokens']:,}", f"{row['cache']['student'] / row['cache']['base']:.3f}"]
        lines.append(f"| {' | '.join([*cells, *(cell(row['metrics'].get(name)) for name in names)])} |")
    return "\n".join(lines) + "\n"


def cell(metric: dict[str, Any] | None) -> str:
    """Return the student's mean as a ratio to the base's, "–" if it has none."""
    if metric is None:
        return ""
    base, student = (metric["values"].get(model, {}).get("mean") for model in ("base", "student"))
    return "–" if not base or student is None else f"{student / base:.3f}"


if __name__ == "__main__":
    main()
