"""Evaluation: student beside base, on the same tokens, with the baselines that would embarrass it.

1. Read the text and the tasks; refuse what is too short or missing, and gates on what will not be measured.
2. Say how the weights are loaded: the base's under the student's plan (base, untrained conversion and window + sinks in one
   instance), the student, and the baselines asked for; all at once or in turns, as memory allows.
3. Run the stages, one after the other; finished ones are kept beside the report and reused after an interruption.
4. Fold the findings into one Results, judge the gates, write results.json and its renderings.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from linearize.checkpoint.student import Student
from linearize.checkpoint.writing import check_writable, write_json, write_text
from linearize.device import versions
from linearize.errors import ConfigError
from linearize.evaluation.request import check_recovery, check_request, lengths_beyond_window
from linearize.evaluation.stages import run_stages, stages_of, work_folder
from linearize.evaluation.suite import Suite, within_positions
from linearize.evaluation.text import read_evaluation_text
from linearize.evaluation.weights import (
    fits_in_memory,
    require_same_shape,
    require_same_tokenizer,
    weight_loaders,
    weights_fingerprint,
)
from linearize.report.card import add_evaluation
from linearize.report.gates import (
    evaluate_gates,
    recovery_gates,
    regression_gates,
)
from linearize.report.markdown import append_summary, render_markdown
from linearize.report.results import CONTROL, SCHEMA_VERSION, STUDENT, Results

UNFINISHED = ".stages"


def evaluate(
    model: Path,
    suite: Suite,
    *,
    base: str | None = None,
    gates: list[str] | None = None,
    min_recovery: float | None = None,
    compare: Path | None = None,
    out: Path | None = None,
    summary_file: Path | None = None,
    precision: str = "auto",
    hold: str = "auto",
    progress: Callable[[str], None] = print,
) -> Results:
    """Measures and, where `out` is given, writes the report there. See the module's list.

    Args:
        summary_file: verdict and table are added to it.
        hold: "together" has all weights in memory at once, "in-turn" one set at a time, "auto" what memory allows.

    Raises:
        ConfigError: bad gates, data, base, tasks, control. LinearizeError: logits that are not finite.
    """
    from linearize.data.documents import data_fingerprint
    from linearize.device import compute_dtype, pick_device
    from linearize.evaluation.harness import task_fingerprint
    from linearize.evaluation.lab import Lab
    from linearize.modeling.loading import load_tokenizer

    started = time.monotonic()
    student = Student.read(model)
    window = student.manifest.settings.window
    expressions, older, tasks = check_request(
        suite, window, gates=gates, min_recovery=min_recovery, compare=compare, summary_file=summary_file
    )
    if out is not None:
        check_writable(out)
    tokenizer = load_tokenizer(model)
    dtype, device = compute_dtype(precision), pick_device()
    unfinished = None if out is None else out / UNFINISHED
    with student.open_base(base) as source, work_folder(unfinished) as work:
        suite, notes = within_positions(suite, source.read_config())
        check_recovery(min_recovery, suite, window)
        if not any(layer.has_branch for layer in student.manifest.plan.layers):
            suite = replace(suite, branch=False)
        require_same_shape(source, student)
        require_same_tokenizer(source, tokenizer)
        text, data = read_evaluation_text(suite, tokenizer, older, dtype, device)
        loaders, folders = weight_loaders(student, source, suite, dtype)
        together = hold == "together" or (hold == "auto" and fits_in_memory(folders, dtype, device))
        if not together:
            notes.append(
                "models took turns in memory; the base's final hidden states waited on disk, in the precision they were "
                "computed in"
            )
        vocabulary = min(len(tokenizer), source.read_config()["vocab_size"])
        lab = Lab(loaders, tokenizer, vocabulary, text, device, suite.seed, together, work, progress)
        identity = {STUDENT: weights_fingerprint(student)}
        if suite.control is not None:
            identity[CONTROL] = weights_fingerprint(Student.read(suite.control))
        identity |= {"base": source.fingerprint(), "dtype": str(dtype), "suite": asdict(suite)}
        identity |= {"data": data_fingerprint([*suite.data, *suite.choice])}
        identity |= {"tasks": [task_fingerprint(task, suite.task_limit) for task in tasks.values()]}
        findings = run_stages(lab, stages_of(suite, tasks, source.fingerprint()), identity, unfinished)
        base_name = source.name
    record = student.manifest.to_dict()
    metrics = tuple(metric for found in findings for metric in found.metrics)
    results = Results(
        schema_version=SCHEMA_VERSION,
        model=model.resolve().name,
        base=base_name,
        settings=record["settings"],
        coverage=record["coverage"],
        cache_bytes=record["cache_bytes"],
        data=data,
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
    if min_recovery is not None:
        recovered = recovery_gates(min_recovery, lengths_beyond_window(suite, window), metrics)
        results = replace(results, gates=(*results.gates, *recovered))
    if older is not None:
        regressions, remarks = regression_gates(older, results)
        results = replace(results, gates=(*results.gates, *regressions), notes=(*results.notes, *remarks))
    _publish(results, model, out, summary_file)
    return results


def _publish(results: Results, model: Path, out: Path | None, summary_file: Path | None) -> None:
    """Writes the report; one that lies in the model's own folder is told in its card, too."""
    if out is not None:
        write_results(results, out)
        card = model / "README.md"  # an adapter alone has none
        if out.resolve() == (model / "eval").resolve() and card.is_file():
            add_evaluation(card, results)
    if summary_file is not None:
        append_summary(summary_file, results)


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
