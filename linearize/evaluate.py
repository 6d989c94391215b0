"""Evaluation: student beside base, on the same tokens, with the baselines that would embarrass it.

1. Read the text; refuse what is too short, and gates on what will not be measured.
2. Load the base's weights under the student's plan (base, untrained conversion and window + sinks in one instance) and
   the student.
3. Run the stages, one after the other; finished ones are kept beside the report and reused after an interruption.
4. Fold the findings into one Results, judge the gates, write results.json and its renderings.
"""

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.checkpoint.writing import write_json, write_text
from linearize.convert import versions
from linearize.errors import ConfigError, LinearizeError, nearest
from linearize.report.card import add_evaluation
from linearize.report.gates import check_gates, evaluate_gates, expand_gates, read_older, regression_gates
from linearize.report.markdown import render_markdown
from linearize.report.results import (
    BASE,
    BRANCH_OFF,
    SCHEMA_VERSION,
    STUDENT,
    UNTRAINED,
    WINDOW,
    WINDOW_OFF,
    Findings,
    Results,
    make_metric,
)

UNFINISHED = ".stages"


@dataclass(frozen=True)
class Suite:
    """What to measure. Empty tuples and zeros leave a part out.

    Attributes:
        lengths: windows for perplexity; at most `max_tokens` of text each.
        recall, associative: distances; `recall_rows` rows each. passkey: context lengths; `passkey_rows` each depth.
        tasks: names of lm-evaluation-harness, from `tasks_dir` if given, `task_limit` items each.
        generation: new tokens for every health prompt. efficiency: context lengths.
        branch: whether to measure the recurrent branch's share and the model with its window off.
        parity: whether to hold cached, padded, batched and reloaded logits against each other.
    """

    data: tuple[str, ...] = ("sample-eval",)
    lengths: tuple[int, ...] = (512, 2048)
    recall: tuple[int, ...] = (64, 256, 1024)
    associative: tuple[int, ...] = ()
    passkey: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    tasks_dir: str | None = None
    task_limit: int | None = None
    generation: int = 0
    efficiency: tuple[int, ...] = ()
    branch: bool = False
    parity: bool = False
    max_tokens: int = 16384
    recall_rows: int = 8
    passkey_rows: int = 2
    text_field: str = "text"
    seed: int = 0

    def metric_names(self) -> list[str]:
        """The metrics that will certainly be measured; a task's are known when it has run."""
        names = [
            f"{kind}@{length}" for length in self.lengths for kind in ("perplexity", "bits_per_byte", "kl", "agreement")
        ]
        for kind in ("recall", "associative", "passkey"):
            names += [f"{kind}@{distance}" for distance in getattr(self, kind)]
        if self.generation:
            names += ["repetition", "distinct2", "length", "stopped"]
        return names


SUITES = {
    "quick": Suite(
        max_tokens=4096, recall_rows=3, associative=(1024,), passkey=(512,), passkey_rows=1, generation=24,
        efficiency=(512, 2048), branch=True, parity=True,
    ),
    "standard": Suite(
        lengths=(512, 2048, 8192), recall=(64, 256, 1024, 4096), associative=(64, 256, 1024, 4096),
        passkey=(1024, 4096), generation=128, efficiency=(512, 2048, 8192), branch=True, parity=True, max_tokens=32768,
    ),
    "full": Suite(
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768), recall=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        associative=(64, 256, 1024, 4096, 16384), passkey=(1024, 4096, 16384), passkey_rows=4, generation=256,
        efficiency=(512, 2048, 8192, 32768), branch=True, parity=True, max_tokens=131072, recall_rows=16,
    ),
}  # fmt: skip


def choose_suite(name: str, only: str | None, **changes: Any) -> Suite:
    """A named suite with the given settings on top, cut down to the parts of `only`."""
    if name not in SUITES:
        raise ConfigError(f"--suite: got '{name}', allowed are {', '.join(SUITES)}{nearest(name, SUITES)}")
    for key in ("max_tokens", "recall_rows"):
        if changes.get(key) is not None and changes[key] < 1:
            raise ConfigError(f"--{key.replace('_', '-')}: got {changes[key]}, allowed are numbers of at least 1")
    suite = replace(SUITES[name], **{key: value for key, value in changes.items() if value is not None})
    if only is None:
        return suite
    parts = {"perplexity": "lengths"}
    parts |= {
        key: key
        for key in ("recall", "associative", "passkey", "tasks", "generation", "efficiency", "branch", "parity")
    }
    wanted = [part.strip() for part in only.split(",")]
    for part in wanted:
        if part not in parts:
            raise ConfigError(f"--only: got '{part}', allowed are {', '.join(parts)}{nearest(part, parts)}")
    empty = {field.name: type(getattr(suite, field.name))() for field in fields(suite)}
    return replace(suite, **{key: empty[key] for part, key in parts.items() if part not in wanted})


def evaluate(
    model: Path,
    suite: Suite,
    *,
    base: str | None = None,
    gates: list[str] | None = None,
    min_recovery: float | None = None,
    compare: Path | None = None,
    out: Path | None = None,
    precision: str = "auto",
    progress: Callable[[str], None] = print,
) -> Results:
    """Measures and, where `out` is given, writes the report there. See the module's list.

    Raises:
        ConfigError: bad gates, data, base, tasks. LinearizeError: logits that are not finite.
    """
    import torch

    from linearize.device import compute_dtype, pick_device
    from linearize.evaluation.lab import Lab
    from linearize.modeling.loading import load_student, load_tokenizer, load_unconverted, open_base, read_manifest
    from linearize.modeling.plan import Plan

    started = time.monotonic()
    expressions = expand_gates(list(gates or []))
    if min_recovery is not None:
        expressions += [f"perplexity@{length}.recovery>={min_recovery}" for length in suite.lengths]
    check_gates(expressions, suite.metric_names(), open_ended=bool(suite.tasks))
    older = read_older(compare) if compare else None
    manifest = read_manifest(model)
    tokenizer = load_tokenizer(model)
    dtype, device = compute_dtype(precision), pick_device()
    with open_base(manifest, base) as source:
        suite, notes = _within_positions(suite, source.read_config())
        text = _text_ids(suite, tokenizer)
        plan = Plan.from_dict(manifest["plan"])
        reference = load_unconverted(source, plan, dtype=dtype).to(device)
        student = load_student(model, dtype=dtype).to(device)
        if reference.config.vocab_size != student.config.vocab_size:
            raise ConfigError(
                f"--base: its vocabulary has {reference.config.vocab_size} tokens, the student's "
                f"{student.config.vocab_size}; their figures cannot be compared"
            )
        lab = Lab(reference, student, tokenizer, text, device, suite.seed, progress)
        identity = {"student": _fingerprint(model), "base": source.fingerprint(), "dtype": str(dtype)}
        kept = None if out is None else out / UNFINISHED
        with torch.no_grad():
            findings = [
                _kept(kept, name, {**identity, "suite": asdict(suite)}, run, lab, progress)
                for name, run in _stages(suite, source.fingerprint())
            ]
        base_name = source.name
    metrics = tuple(metric for found in findings for metric in found.metrics)
    results = Results(
        schema_version=SCHEMA_VERSION,
        model=model.resolve().name,
        base=base_name,
        settings=manifest["settings"],
        coverage=manifest["coverage"],
        cache_bytes=manifest["cache_bytes"],
        data=_data_record(suite, text, dtype, device),
        metrics=metrics,
        positions={name: rows for found in findings for name, rows in found.positions.items()},
        tables={name: rows for found in findings for name, rows in found.tables.items()},
        checks=tuple(check for found in findings for check in found.checks),
        gates=evaluate_gates(expressions, metrics),
        seed=suite.seed,
        seconds=time.monotonic() - started,
        versions=versions(),
        command=shlex.join(["linearize", *sys.argv[1:]]),
        notes=(*notes, *(note for found in findings for note in found.notes)),
    )
    if older is not None:
        results = replace(results, gates=(*results.gates, *regression_gates(older, results)))
    if out is not None:
        write_results(results, out)
        if out.resolve() == (model / "eval").resolve():
            add_evaluation(model / "README.md", results)
    return results


def write_results(results: Results, out: Path) -> None:
    """results.json and every rendering of it; what an interrupted run had kept is cleared away."""
    from linearize.report.html import render_html
    from linearize.report.plots import write_plots

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results.to_dict())
        write_text(out / "report.md", render_markdown(results))
        write_text(out / "report.html", render_html(results))
        write_plots(results, out / "plots")
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {out}") from None
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _stages(suite: Suite, base_fingerprint: str) -> Iterator[tuple[str, Callable]]:
    """What the suite asks for, cheap and telling first: (name, function of the lab)."""
    from linearize.bench import bench_model, crossover
    from linearize.evaluation.branch_use import measure_branch_share
    from linearize.evaluation.harness import measure_tasks
    from linearize.evaluation.parity import measure_parity

    if suite.parity:
        yield "parity", measure_parity
    for length in suite.lengths:
        yield f"perplexity@{length}", lambda lab, n=length: _perplexity(lab, suite, n)
    for distance in suite.recall:
        yield f"recall@{distance}", lambda lab, n=distance: _recall(lab, suite, "recall", n)
    for distance in suite.associative:
        yield f"associative@{distance}", lambda lab, n=distance: _recall(lab, suite, "associative", n)
    for length in suite.passkey:
        yield f"passkey@{length}", lambda lab, n=length: _passkey(lab, suite, n)
    if suite.branch and suite.lengths:
        yield "branch", lambda lab: measure_branch_share(lab, max(suite.lengths))
    if suite.generation:
        yield "generation", lambda lab: _generation(lab, suite.generation)
    if suite.tasks:
        folder = Path(suite.tasks_dir) if suite.tasks_dir else None
        yield "tasks", lambda lab: measure_tasks(lab, suite.tasks, folder, suite.task_limit, base_fingerprint)

    def efficiency(lab) -> Findings:
        rows = bench_model(lab.student, suite.efficiency, progress=lab.progress)
        words = [
            f"{what}: {crossover(rows, f'{what}_tokens_per_second')}" for what in ("prefill", "decode") if len(rows) > 1
        ]
        return Findings(tables={"efficiency": rows}, notes=tuple(words))

    if suite.efficiency:
        yield "efficiency", efficiency


def _kept(folder: Path | None, name: str, identity: dict, run: Callable, lab, progress) -> Findings:
    """Runs a stage, or takes what an interrupted run with the same models and settings found."""
    from pydantic import TypeAdapter

    if folder is None:
        return run(lab)
    adapter = TypeAdapter(Findings)
    path = folder / f"{fingerprint_of({**identity, 'stage': name})}.json"
    if path.is_file():
        progress(f"{name}: kept from an interrupted run")
        return adapter.validate_json(path.read_bytes())
    found = run(lab)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, adapter.dump_json(found).decode())
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {folder.parent}") from None
    return found


def _within_positions(suite: Suite, config: dict) -> tuple[Suite, list[str]]:
    """Leaves out what is longer than the base's positions, and says so."""
    limit = config.get("max_position_embeddings") or math.inf
    longest = {
        "lengths": lambda n: n,
        "recall": lambda n: 2 * n + 1 if n < 256 else n + 257,
        "associative": lambda n: n + 129,
        "passkey": lambda n: n + 8,
        "efficiency": lambda n: n + 8,
    }
    notes, changes = [], {}
    for name, tokens in longest.items():
        beyond = [n for n in getattr(suite, name) if tokens(n) > limit]
        if beyond:
            changes[name] = tuple(n for n in getattr(suite, name) if n not in beyond)
            notes.append(f"{name} {', '.join(map(str, beyond))} left out: longer than the base's {limit} positions")
    return replace(suite, **changes), notes


def _perplexity(lab, suite: Suite, length: int) -> Findings:
    import torch

    from linearize.evaluation.perplexity import WindowScores, position_buckets, score_window, windows_of

    others = [STUDENT, BRANCH_OFF, UNTRAINED, WINDOW] + ([WINDOW_OFF] if suite.branch else [])
    base, forwards = lab.forwards(BASE)[BASE], lab.forwards(*others)
    scores = {name: WindowScores() for name in (BASE, *forwards)}
    windows = windows_of(lab.text, length, suite.max_tokens)
    for i, window in enumerate(windows):
        score_window(window[None].to(lab.device), base, forwards, scores)
        lab.tick(f"perplexity@{length}", i + 1, len(windows))
    losses = {name: [x.mean().item() for x in score.losses] for name, score in scores.items()}
    _require_finite(losses, length)
    counts = [len(lab.tokenizer.decode(window[1:]).encode()) for window in windows]
    bits = {
        name: [x.sum().item() / math.log(2) / max(1, count) for x, count in zip(score.losses, counts)]
        for name, score in scores.items()
    }
    metrics = (
        make_metric(f"perplexity@{length}", "lower", losses, exponentiate=True),
        make_metric(f"bits_per_byte@{length}", "lower", bits),
        make_metric(f"kl@{length}", "lower", {name: scores[name].kl for name in forwards}),
        make_metric(f"agreement@{length}", "higher", {name: scores[name].agreement for name in forwards}),
    )
    rows = []
    stacked = {name: torch.stack(score.losses) for name, score in scores.items()}
    for start, end in position_buckets(length):
        # position p is the p-th token after the first
        means = {name: values[:, start - 1 : end - 1].mean().exp().item() for name, values in stacked.items()}
        rows.append({"start": start, "end": end, **means})
    return Findings(metrics=metrics, positions={f"perplexity@{length}": rows})


def _recall(lab, suite: Suite, kind: str, distance: int) -> Findings:
    from linearize.evaluation.recall import accuracy, associative_accuracy, associative_task, recall_task

    make, score = {"recall": (recall_task, accuracy), "associative": (associative_task, associative_accuracy)}[kind]
    task = make(distance, suite.recall_rows, len(lab.tokenizer), lab.tokenizer.bos_token_id, suite.seed)
    others = [STUDENT, BRANCH_OFF, UNTRAINED, WINDOW] + ([WINDOW_OFF] if suite.branch else [])
    forwards = lab.forwards(BASE, *others)
    units: dict[str, list[float]] = {name: [] for name in forwards}
    for i, row in enumerate(task.ids):
        for name, forward in forwards.items():
            hidden, head = forward(row[None].to(lab.device))
            units[name].append(score(hidden, head, row.to(lab.device), task.counted))
        lab.tick(f"{kind}@{distance}", i + 1, len(task.ids))
    return Findings(metrics=(make_metric(f"{kind}@{distance}", "higher", units),))


def _passkey(lab, suite: Suite, length: int) -> Findings:
    from linearize.evaluation.passkey import DEPTHS, answer_is_right, passkey_task

    units: dict[str, list[float]] = {BASE: [], STUDENT: [], WINDOW: []}
    rows = []
    for depth in DEPTHS:
        task = passkey_task(lab, length, depth, suite.passkey_rows)
        row: dict[str, Any] = {"length": length, "depth": depth}
        for name in units:
            model, mode = lab.modes()[name]
            with mode():
                right = [answer_is_right(lab, model, p, a) for p, a in zip(task.prompts, task.answers)]
            units[name] += right
            row[name] = sum(right) / len(right)
        rows.append(row)
        lab.progress(f"passkey@{length}: depth {depth}")
    metric = make_metric(f"passkey@{length}", "higher", units, items=True)
    return Findings(metrics=(metric,), tables={f"passkey@{length}": rows})


def _generation(lab, tokens: int) -> Findings:
    from linearize.evaluation.generation import PROMPTS, health, prompt_ids

    figures: dict[str, dict[str, list[float]]] = {}
    samples = []
    for number, prompt in enumerate(PROMPTS):
        row: dict[str, Any] = {"prompt": prompt}
        for name in (BASE, STUDENT, WINDOW):
            model, mode = lab.modes()[name]
            with mode():
                produced = lab.greedy(model, prompt_ids(lab, prompt), tokens)
            for key, value in health(produced, stopped=len(produced) < tokens).items():
                figures.setdefault(key, {}).setdefault(name, []).append(value)
            row[name] = lab.tokenizer.decode(produced, skip_special_tokens=True)
        samples.append(row)
        lab.tick("generation", number + 1, len(PROMPTS))
    better = {"repetition": "lower", "distinct2": "higher", "length": "higher", "stopped": "higher"}
    metrics = tuple(make_metric(key, better[key], units) for key, units in figures.items())
    return Findings(metrics=metrics, tables={"samples": samples})


def _require_finite(losses: dict[str, list[float]], length: int) -> None:
    for name, values in losses.items():
        if not all(math.isfinite(value) for value in values):
            raise LinearizeError(f"{name}: its logits are not finite at {length} tokens; the checkpoint is damaged")


def _text_ids(suite: Suite, tokenizer):
    """The evaluation text as one row of token ids, documents joined by an end-of-sequence token."""
    import torch

    from linearize.training.data import documents

    longest = max(suite.lengths, default=2)
    needed = max(suite.max_tokens, longest)
    ids: list[int] = []
    for name in suite.data:
        for document, _ in documents(name, tokenizer, text_field=suite.text_field, completion_only=False, seed=None):
            ids += document
            if len(ids) >= needed:
                break
    if len(ids) < longest:
        raise ConfigError(
            f"--data: {', '.join(suite.data)} hold {len(ids)} tokens, fewer than one window of {longest} (--lengths)"
        )
    return torch.tensor(ids)


def _data_record(suite: Suite, text_ids, dtype, device: str) -> dict[str, Any]:
    from linearize.training.data import data_fingerprint

    return {
        "text": ", ".join(suite.data),
        "text fingerprint": data_fingerprint(list(suite.data))[:16],
        "tokens per length": min(suite.max_tokens, text_ids.numel()),
        "recall rows per distance": suite.recall_rows,
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}",
    }


def _fingerprint(model: Path) -> str:
    """Of a student: its records, and names, sizes and times of its weights."""
    files = sorted(path for path in model.rglob("*.safetensors"))
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return sha256([(model / "linearize.json").read_bytes(), *(line.encode() for line in stats)])
