"""Run the command line on thousands of damaged inputs, kill it at hundreds of points, and in odd environments.

    python tests/robustness/campaign.py [--mutations 2500] [--crashes 500] [--environments 200] [--seed 0] [--only NAME]

Every case runs in a process of its own. A damaged input has to end in an exit code of ours, with one printable line on
standard error, nothing changed and nothing left behind. After a kill the same command has to end well, and leave the
old output or the new one whole.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# forked processes have one thread, and so must this one before it forks
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environments import ENVIRONMENTS
from mutations import mutate

# seconds and bytes of address space that a case may take
CASE_SECONDS, CASE_BYTES = 120, 12 << 30
CODES = {0, 1, 2, 3, 4, 5}
KILLED, STOPPED = 137, 130
# ends of names that nothing has after a command
UNFINISHED = (".partial", ".replaced", ".removed", ".tmp")
# part of the names of temporary folders
TEMPORARY = "linearize-"
# functions of `os` that change what is on the disk: the process dies before one of their calls
CHANGING = ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "fsync")
CONVERT = ("--window", "12", "--sinks", "2", "--keep-softmax", "none", "--no-verify")
MEASURE = ("eval", "s", "--only", "perplexity", "--lengths", "64", "--max-tokens", "128", "--data", "text.txt")
TRAIN = ("finetune", "s", "-o", "out", "--recipe", "ci", "--seq-len", "64", "--tokens", "128", "--data")


@dataclass
class Outcome:
    """The end of one process: its exit code (128 and more for a signal), what it printed, and its time."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Target:
    """An input to damage: the files that can be, and the commands that read them, run in a copy of `folder`."""

    name: str
    folder: Path
    files: list[str]
    commands: list[list[str]]


@dataclass
class Report:
    """The cases that failed, of how many; `only` leaves out cases whose names do not contain it."""

    only: str | None = None
    cases: int = 0
    failures: list[str] = field(default_factory=list)

    def begins(self, case: str) -> bool:
        """Return True if a case is to be run, and count it."""
        wanted = self.only is None or self.only in case
        self.cases += wanted
        return wanted

    def fail(self, case: str, why: str) -> None:
        """Note a failure."""
        self.failures.append(f"{case}: {why}")
        print(f"FAILED {case}: {why}", flush=True)


def run_apart(arguments: list[str], cwd: Path, prepare: Callable[[], None] = lambda: None) -> Outcome:
    """Run the command line in a process of its own.

    Args:
        prepare: is called in the process before the command.
    """

    def command() -> int:
        from linearize.cli.app import run

        prepare()
        return run(arguments)

    return apart(command, cwd.parent / cwd.name, cwd)


def apart(function: Callable[[], int], name: Path, cwd: Path) -> Outcome:
    """Call a function in a forked process; it returns the exit code. Output goes to files that begin with `name`."""
    out, err = name.with_name(f"{name.name}.stdout"), name.with_name(f"{name.name}.stderr")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(cwd)
            tempfile.tempdir = None  # that of the environment
            for path, descriptor in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (CASE_BYTES, CASE_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    done = 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() - started > CASE_SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(124, "", "took too long", time.monotonic() - started)
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return Outcome(code if code >= 0 else 128 - code, *texts, time.monotonic() - started)


def faults(outcome: Outcome) -> str | None:
    """Say what is wrong with the end of a command on a damaged input; None if nothing is."""
    if outcome.code not in CODES:
        return f"exit code {outcome.code}: {outcome.err[-300:]!r}"
    if "Traceback" in outcome.err or "unforeseen" in outcome.err:
        return f"unforeseen: {outcome.err[-300:]!r}"
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    if outcome.code not in (0, 3) and len(errors) != 1:
        return f"{len(errors)} error lines: {outcome.err[-300:]!r}"
    if any(len(line) > 2200 or not line.isprintable() for line in errors):
        return f"an error line that is too long or not printable: {errors[0][:300]!r}"
    return None


def snapshot(folder: Path) -> dict[str, str]:
    """Return a digest of every file in a folder; links by their target."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


@contextlib.contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """Yield a copy of an input, with a cache and a temporary folder of its own beside it."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as work:
        copy = Path(work) / "in"
        shutil.copytree(folder, copy, symlinks=True)
        (Path(work) / "tmp").mkdir()
        os.environ |= {"XDG_CACHE_HOME": str(Path(work) / "cache"), "TMPDIR": str(Path(work) / "tmp")}
        yield copy


def leftovers(folder: Path) -> list[str]:
    """Return the unfinished files and folders in an input's copy and in the temporary folder beside it."""
    paths = [*folder.rglob("*"), *(folder.parent / "tmp").iterdir()]
    return [
        path.name for path in paths if path.name.endswith(UNFINISHED) or "linearize-" in path.name.removeprefix(".")
    ]


def run_mutations(targets: list[Target], count: int, seed: int, report: Report) -> None:
    """Damage one file at a time, and run a command on the folder that it is in."""
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        target = targets[number % len(targets)]
        file, command = rng.choice(target.files), rng.choice(target.commands)
        case = f"{target.name}-{seed}-{number} ({file}; {' '.join(command)[:60]})"
        if not report.begins(case):
            continue
        with copy_of(target.folder) as folder:
            mutate(folder / file, rng)
            before = snapshot(folder)
            outcome = run_apart(command, folder)
            after = {name: digest for name, digest in snapshot(folder).items() if not name.startswith("out/")}
            kept = {name: digest for name, digest in before.items() if not name.startswith("out/")}
            why = faults(outcome)
            if why is None and {name: after.get(name) for name in kept} != kept:
                why = f"changed its input: {sorted(name for name in kept if after.get(name) != kept[name])}"
            if why is None and outcome.code != 0 and (left := sorted(after.keys() - kept.keys())):
                why = f"left {left}"
            if why is not None:
                report.fail(case, why)


@dataclass
class Crash:
    """A command to kill.

    Attributes:
        folder: where it runs, in a copy.
        out: the output that has to be whole afterwards: with all of `whole`, or not there.
    """

    name: str
    folder: Path
    command: list[str]
    out: str
    whole: tuple[str, ...] = ("linearize.json", "config.json")


def die_at(call: int, counted: Path) -> None:
    """Make this process kill itself before the `call`-th change to the disk, and write down how many it has made."""
    made = [0]
    for name in CHANGING:
        real = getattr(os, name)

        def dying(*arguments, _real=real, **options):
            made[0] += 1
            if made[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            counted.write_text(str(made[0]))
            return _real(*arguments, **options)

        setattr(os, name, dying)


def changes_of(crash: Crash) -> int:
    """Return the number of changes to the disk that a command makes."""
    with copy_of(crash.folder) as folder:
        counted = folder.parent / "changes"
        outcome = run_apart(crash.command, folder, lambda: die_at(0, counted))
        if outcome.code != 0:
            raise RuntimeError(f"{crash.name} fails: {outcome.err[-1000:]}")
        return int(counted.read_text())


def run_crashes(crashes: list[Crash], count: int, seed: int, report: Report) -> None:
    """Kill each command at points spread over all its changes to the disk, run it again, and look at what is there."""
    changes = [changes_of(crash) for crash in crashes] if count else []
    print("changes to the disk:", ", ".join(f"{crash.name} {most}" for crash, most in zip(crashes, changes)))
    for number in range(count):
        crash, most = crashes[number % len(crashes)], changes[number % len(crashes)]
        point = random.Random(f"{seed}-{number}").randrange(1, most + 1)
        case = f"{crash.name} killed at change {point} of {most} ({number})"
        if not report.begins(case):
            continue
        with copy_of(crash.folder) as folder:
            why = _killed_and_again(crash, point, folder)
            if why is not None:
                report.fail(case, why)


def _killed_and_again(crash: Crash, point: int, folder: Path) -> str | None:
    """Kill a command, run it again, and say what is wrong then; None if nothing is."""
    outcome = run_apart(crash.command, folder, lambda: die_at(point, folder.parent / "changes"))
    out = folder / crash.out
    if outcome.code != KILLED:
        return f"was not killed: exit code {outcome.code}: {outcome.err[-200:]!r}"
    if out.exists() and any(not (out / name).is_file() for name in crash.whole):
        return f"half an output: {sorted(os.listdir(out))}"
    again = crash.command
    if again[0] in ("convert", "finetune") and "--overwrite" not in again and out.exists():
        again = [*again, "--overwrite"]
    outcome = run_apart(again, folder)
    left = [*leftovers(folder), *(path.name for path in folder.rglob("*.training"))]
    if outcome.code != 0:
        return f"then exit code {outcome.code}: {outcome.err[-300:]!r}"
    if left or any(not (out / name).is_file() for name in crash.whole):
        return f"then left {left}, output {sorted(os.listdir(out))}"
    return None


def run_environments(crashes: list[Crash], count: int, seed: int, report: Report) -> None:
    """Run each command in odd environments; it may fail, in words, and leaves nothing."""
    pairs = [(crash, name) for crash in crashes for name in ENVIRONMENTS]
    random.Random(seed).shuffle(pairs)
    for crash, name in pairs[:count]:
        case = f"{crash.name} where {name}"
        if not report.begins(case):
            continue
        with copy_of(crash.folder) as folder:
            outcome = run_apart(crash.command, folder, ENVIRONMENTS[name])
            if outcome.code not in CODES | {STOPPED}:
                report.fail(case, f"exit code {outcome.code}: {outcome.err[-300:]!r}")
            elif "Traceback" in outcome.err or "unforeseen" in outcome.err:
                report.fail(case, f"unforeseen: {outcome.err[-300:]!r}")
            elif left := leftovers(folder):
                report.fail(case, f"left {left}")


def build(work: Path) -> None:
    """Write the inputs: a base, its shards, a GGUF file, an adapter, a student, settings, data and older results."""
    from helpers import reshard, tiny_base, write_base

    from linearize.cli.app import run

    def require(folder: Path, *arguments: str) -> None:
        os.chdir(folder)
        if (code := run([*arguments])) != 0:
            raise SystemExit(f"cannot prepare the campaign: {' '.join(arguments)} ended with {code}")

    base, sharded, adapter, gguf = (work / name for name in ("base", "shards", "adapter", "gguf"))
    make_tokenizer(work / "tokenizer")
    write_base(base / "m", work / "tokenizer")
    shutil.copytree(base, sharded)
    reshard(sharded / "m", 2)
    shutil.copytree(base, adapter)
    make_adapter(tiny_base(), adapter)
    gguf.mkdir()
    make_gguf(gguf / "m.gguf", work / "tokenizer")
    student, settings, converted = (work / name for name in ("student", "settings", "converted"))
    shutil.copytree(base, student)
    (student / "text.txt").write_text("A fox ran over the hill, and the hounds ran after it, all day long.\n" * 60)
    rows = [{"text": f"Row {number} of a small file of rows. " * 20} for number in range(40)]
    (student / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (student / "rows.json").write_text(json.dumps(rows))
    require(student, "convert", "m", "-o", "s", *CONVERT)
    require(student, *MEASURE, "-o", "earlier")
    (student / "earlier/results.json").rename(student / "older.json")
    pipeline = {
        "model": "m", "out": "all", "convert": {"window": 12, "keep_softmax": "none"},
        "finetune": {"recipe": "ci", "seq_len": 64, "tokens": 256, "data": ["rows.jsonl"], "checkpoint_every": 1},
    }  # fmt: skip
    (student / "all.yaml").write_text(json.dumps(pipeline))
    shutil.copytree(base, settings)
    (settings / "c.json").write_text(json.dumps({"mixer": "vq", "window": 12, "sinks": 2, "keep_softmax": "none"}))
    (settings / "p.json").write_text(json.dumps({key: pipeline[key] for key in ("model", "out", "convert")}))
    shutil.copytree(student, converted)
    (converted / "s").rename(converted / "out")


def targets_of(work: Path) -> list[Target]:
    """Return what there is to damage in the inputs that `build` wrote."""

    def present(folder: str, pattern: str) -> list[str]:
        return sorted(path.relative_to(work / folder).as_posix() for path in (work / folder).glob(pattern))

    plan, convert = ["plan", "m", *CONVERT[:6]], ["convert", "m", "-o", "out", *CONVERT, "--no-calibrate"]
    of_base = [*present("base", "m/*.json"), *present("base", "m/*.safetensors")]
    of_adapter = ["a/adapter_config.json", "a/adapter_model.safetensors"]
    merge = [[*command[:1], "a", *command[2:], "--merge-adapter"] for command in (plan, convert)]
    of_student = [f"s/{name}" for name in ("linearize.json", "config.json", "README.md")]
    of_student += [*present("student", "s/*.index.json"), *present("student", "s/*.safetensors")]
    measure = [*MEASURE, "-o", "out"]
    return [
        Target("base", work / "base", of_base, [plan, convert, ["convert", "m", "-o", "out", *CONVERT]]),
        Target("shards", work / "shards", present("shards", "m/model*"), [plan, convert]),
        Target("adapter", work / "adapter", of_adapter, merge),
        Target("gguf", work / "gguf", ["m.gguf"], [["plan", "m.gguf", *CONVERT[:6]]]),
        Target("student", work / "student", of_student, [measure, [*TRAIN, "rows.jsonl"], ["plan", "s"]]),
        Target("rows", work / "student", ["rows.jsonl"], [[*TRAIN, "rows.jsonl"]]),
        Target("array", work / "student", ["rows.json"], [[*TRAIN, "rows.json"]]),
        Target("older", work / "student", ["older.json"], [[*measure, "--compare", "older.json"]]),
        Target("settings", work / "settings", ["c.json"], [["convert", "m", "--dry-run", "--config", "c.json"]]),
        Target("pipeline", work / "settings", ["p.json"], [["run", "p.json"]]),
    ]


def crashes_of(work: Path) -> list[Crash]:
    """Return the commands to kill."""
    student = work / "student"
    return [
        Crash("convert", student, ["convert", "m", "-o", "out", *CONVERT], "out"),
        Crash("replace", work / "converted", ["convert", "m", "-o", "out", *CONVERT, "--overwrite"], "out"),
        Crash("finetune", student, [*TRAIN, "rows.jsonl", "--set", "checkpoint_every=1"], "out"),
        Crash("run", student, ["run", "all.yaml"], "all/finetuned"),
        Crash("eval", student, [*MEASURE, "-o", "out"], "out", whole=()),
        Crash("gguf", work / "gguf", ["convert", "m.gguf", "-o", "out", *CONVERT, "--no-calibrate"], "out"),
    ]


def make_tokenizer(folder: Path) -> None:
    """Write a small byte-level BPE."""
    from helpers import VOCABULARY
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the fox and the hounds ran over the hill all day long"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)


def make_adapter(model, folder: Path) -> None:
    """Write a LoRA adapter of the model in folder/m into folder/a."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(folder / "a")
    config = json.loads((folder / "a/adapter_config.json").read_text())
    (folder / "a/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "m"}))


def make_gguf(path: Path, tokenizer_folder: Path) -> None:
    """Write a tiny Llama as GGUF."""
    from gguf_writer import write_gguf
    from helpers import family_base
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    write_gguf(family_base("llama", vocab_size=len(tokenizer)), tokenizer, path, "llama")


def campaign(mutations: int, crashes: int, environments: int, seed: int, only: str | None = None) -> Report:
    """Run a campaign, and return its report."""
    for module in ("torch", "transformers", "peft", "datasets", "accelerate", "linearize.cli.app"):
        importlib.import_module(module)  # once, for all processes that are forked
    report = Report(only)
    before = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "TMPDIR")}
    with tempfile.TemporaryDirectory(prefix="campaign-inputs-") as folder:
        work = Path(folder)
        try:
            os.environ["XDG_CACHE_HOME"] = str(work / "cache")
            built = apart(lambda: build(work) or 0, work / "build", work)
            if built.code != 0:
                raise RuntimeError(f"the campaign's inputs cannot be built: {built.err[-2000:]}")
            run_mutations(targets_of(work), mutations, seed, report)
            run_crashes(crashes_of(work), crashes, seed, report)
            run_environments(crashes_of(work), environments, seed, report)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
    return report


def main() -> None:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2500)
    parser.add_argument("--crashes", type=int, default=500)
    parser.add_argument("--environments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="run the cases whose names contain this text")
    arguments = parser.parse_args()
    started = time.monotonic()
    report = campaign(arguments.mutations, arguments.crashes, arguments.environments, arguments.seed, arguments.only)
    print(f"{len(report.failures)} of {report.cases} cases failed, {time.monotonic() - started:.0f} s")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
