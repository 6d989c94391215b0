"""Evaluate a student beside its base, on the same tokens, with the baselines that it has to beat.

1. Check the request: gates, older results, tasks and other files, before any weights are loaded.
2. Open the base, cut the suite to its positions, and refuse a base that does not match the student.
3. Read the text and decide how the weights are loaded: all at once, or in turns where memory is short. The base's
   weights under the student's plan serve as base, untrained conversion and window + sinks.
4. Run the suite's stages one after the other. Finished ones are saved beside the report until it is written.
5. Fold the stages' results into one `Results` and judge the gates.
6. Write results.json and its renderings.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from linearize.checkpoint.json_file import read_object
from linearize.checkpoint.output_folder import check_writable
from linearize.checkpoint.source import Source
from linearize.checkpoint.student import Student
from linearize.checkpoint.work_folder import make_folder, remove
from linearize.checkpoint.writing import write_json, write_text
from linearize.data.documents import data_fingerprint
from linearize.device import compute_dtype, pick_device, versions
from linearize.errors import CheckpointError, ConfigError
from linearize.evaluation.context import EvaluationContext
from linearize.evaluation.registry import MEASUREMENTS
from linearize.evaluation.request import Request, check_recovery, check_request, lengths_beyond_window
from linearize.evaluation.stages import run_stages, stages_of, work_folder
from linearize.evaluation.suite import Suite, choose_suite, cut_to_plan, cut_to_positions
from linearize.evaluation.text import read_evaluation_text
from linearize.evaluation.weights import (
    fits_in_memory,
    require_same_shape,
    require_same_tokenizer,
    weight_loaders,
    weights_fingerprint,
)
from linearize.modeling.loading import load_tokenizer
from linearize.report.card import add_evaluation
from linearize.report.comparison import regression_gates
from linearize.report.gates import evaluate_gates, recovery_gates
from linearize.report.html import render_html
from linearize.report.markdown import append_summary, render_markdown
from linearize.report.plots import write_plots
from linearize.report.results import CONTROL, SCHEMA_VERSION, STUDENT, Results, StageResult

# folder beside the report for the results of finished stages
UNFINISHED = ".stages"
IN_TURN_NOTE = (
    "models took turns in memory; the base's final hidden states waited on disk, in the precision they were computed in"
)


def evaluate(
    model: Path | str | Student,
    suite: Suite | str = "quick",
    *,
    base: str | None = None,
    gates: Sequence[str] | None = None,
    min_recovery: float | None = None,
    compare: Path | str | None = None,
    out: Path | str | None = None,
    summary_file: Path | str | None = None,
    precision: str = "auto",
    hold: str = "auto",
    progress: Callable[[str], None] = print,
) -> Results:
    """Measure a linearized model beside its base.

    Args:
        model: a folder that `convert` or `finetune` wrote.
        suite: "quick", "standard" or "full", or a `Suite` such as `linearize.evaluation.suite.choose_suite` returns.
        base: the base model, if it is no longer where the conversion found it.
        gates: conditions such as "perplexity@2048.ratio<=1.05", or paths of files that list them.
        min_recovery: least recovery of perplexity (`Metric.recovery`) at lengths beyond the window, as one more gate.
        compare: results.json of an earlier run. Every metric of both runs gets a gate: the student is no worse now.
        out: folder for results.json, report.md, report.html and plots. A run that was interrupted goes on from there.
        summary_file: file to append the verdict and the table to.
        precision: "fp32", "bf16", or "auto" for the faster one here.
        hold: "together" for all weights in memory at once, "in-turn" for one set at a time, "auto" for what fits.
        progress: receives one line of text at a time.

    Returns:
        All metrics and tables. `passed` is False if a gate or a parity check failed, and `verdict` says which.

    Raises:
        ConfigError: gates, data, tasks, the base or the control (`Suite.control`) are unusable.
        LinearizeError: a model's logits are not finite.

    Example:
        >>> import linearize
        >>> suite = linearize.Suite(lengths=(128,), recall=(64,), max_tokens=512)
        >>> results = linearize.evaluate("my-student", suite, gates=["perplexity@128.ratio<=9"], out="report")
        >>> results.verdict
        'passed 1 gate(s)'
    """
    started = time.monotonic()
    student = model if isinstance(model, Student) else Student.read(model)
    suite = choose_suite(suite) if isinstance(suite, str) else suite
    compare, out, summary_file = (None if path is None else Path(path) for path in (compare, out, summary_file))
    window = student.manifest.settings.window
    if out is not None:
        check_report_folder(out)
    request = check_request(suite, window, gates, min_recovery, compare=compare, summary_file=summary_file)
    if out is not None:
        check_writable(out)
    suite, results = _measure(student, suite, request, _Execution(base, precision, hold, out, progress))
    results = replace(results, seconds=time.monotonic() - started)
    results = _judge(results, request, lengths_beyond_window(suite, window))
    _publish(results, student.folder, out, summary_file, progress)
    return results


@dataclass(frozen=True)
class _Execution:
    """How to run an evaluation; the fields are arguments of `evaluate`."""

    base: str | None
    precision: str
    hold: str
    out: Path | None
    progress: Callable[[str], None]


@dataclass(frozen=True)
class _Models:
    """The student and its base, and the precision and device they run in."""

    student: Student
    source: Source
    tokenizer: Any
    dtype: torch.dtype
    device: str


def _measure(student: Student, suite: Suite, request: Request, execution: _Execution) -> tuple[Suite, Results]:
    """Open the base and run the stages; return the suite that its positions allow, and unjudged results."""
    tokenizer = load_tokenizer(student.folder)
    unfinished = None if execution.out is None else execution.out / UNFINISHED
    with student.open_base(execution.base) as source, work_folder(unfinished) as work:
        suite, notes = cut_to_positions(cut_to_plan(suite, student.manifest.plan), source.read_config())
        check_recovery(request.min_recovery, suite, student.manifest.settings.window)
        models = _Models(student, source, tokenizer, compute_dtype(execution.precision), pick_device())
        context, data = _open_context(models, suite, request, execution, work)
        if not context.all_in_memory:
            notes.append(IN_TURN_NOTE)
        stages = stages_of(suite, request.inputs)
        stage_results = run_stages(context, stages, _identity(models, suite, request), unfinished)
        return suite, _fold(models, suite, data, stage_results, notes)


def _open_context(
    models: _Models, suite: Suite, request: Request, execution: _Execution, work: Path
) -> tuple[EvaluationContext, dict[str, Any]]:
    """Read the text and decide how the weights are loaded; return the context of the stages and `Results.data`."""
    student, source, tokenizer = models.student, models.source, models.tokenizer
    require_same_shape(source, student)
    require_same_tokenizer(source, tokenizer)
    text, data = read_evaluation_text(suite, tokenizer, request.older, models.dtype, models.device)
    loaders, folders = weight_loaders(student, source, suite, models.dtype)
    if execution.hold == "auto":
        all_in_memory = fits_in_memory(folders, models.dtype, models.device)
    else:
        all_in_memory = execution.hold == "together"
    context = EvaluationContext(
        loaders=loaders,
        tokenizer=tokenizer,
        vocabulary=min(len(tokenizer), source.read_config()["vocab_size"]),
        text=text,
        base_fingerprint=source.fingerprint(),
        device=models.device,
        seed=suite.seed,
        all_in_memory=all_in_memory,
        work=work,
        progress=execution.progress,
    )
    return context, data


def _identity(models: _Models, suite: Suite, request: Request) -> dict[str, Any]:
    """Return what has to be the same for the saved result of a stage to be used: models, settings and data."""
    files = {name: m.fingerprint(suite, request.inputs[name]) for name, m in MEASUREMENTS.items()}
    identity = {
        STUDENT: weights_fingerprint(models.student),
        "base": models.source.fingerprint(),
        "dtype": str(models.dtype),
        "suite": asdict(suite),
        "data": data_fingerprint(list(suite.data)),
        "files": files,
    }
    if suite.control is not None:
        identity[CONTROL] = weights_fingerprint(Student.read(suite.control))
    return identity


def _fold(
    models: _Models, suite: Suite, data: dict[str, Any], stage_results: list[StageResult], notes: list[str]
) -> Results:
    """Join the results of all stages, not judged yet."""
    student = models.student
    record = student.manifest.to_dict()
    return Results(
        schema_version=SCHEMA_VERSION,
        model=student.folder.resolve().name,
        base=models.source.name,
        settings=record["settings"],
        coverage=record["coverage"],
        cache_bytes=record["cache_bytes"],
        data=data,
        metrics=tuple(metric for result in stage_results for metric in result.metrics),
        positions={name: rows for result in stage_results for name, rows in result.positions.items()},
        tables={name: rows for result in stage_results for name, rows in result.tables.items()},
        checks=tuple(check for result in stage_results for check in result.checks),
        gates=(),
        seed=suite.seed,
        seconds=0.0,
        versions=versions(),
        command=shlex.join(["linearize", *sys.argv[1:]]),
        notes=(*notes, *(note for result in stage_results for note in result.notes)),
    )


def _judge(results: Results, request: Request, lengths: list[int]) -> Results:
    """Add the gates of the request, of a least recovery at the given lengths, and of older results."""
    gates = evaluate_gates(request.gates, results.metrics)
    notes = results.notes
    if request.min_recovery is not None:
        gates += recovery_gates(request.min_recovery, lengths, results.metrics)
    if request.older is not None:
        regressions, remarks = regression_gates(request.older, results)
        gates, notes = gates + regressions, notes + remarks
    return replace(results, gates=gates, notes=notes)


def _publish(
    results: Results, model: Path, out: Path | None, summary_file: Path | None, progress: Callable[[str], None]
) -> None:
    """Write the report. One in the model's own folder goes into the model's card as well."""
    if out is not None:
        write_results(results, out)
        card = model / "README.md"  # an adapter alone has none
        if out.resolve() == (model / "eval").resolve() and card.is_file():
            problem = add_evaluation(card, results)
            if problem is not None:
                progress(problem)
    if summary_file is not None:
        append_summary(summary_file, results)


def check_report_folder(out: Path) -> None:
    """Refuse a folder in which a report would take the place of files that are no report's.

    Raises:
        ConfigError: it has a file or a link of a name that the report writes, and no results.json of an evaluation.
    """
    names = ("results.json", "report.md", "report.html", "plots")
    links = [name for name in names if (out / name).is_symlink()]
    with contextlib.suppress(CheckpointError):
        if not links and {"schema_version", "metrics"} <= read_object(out / "results.json").keys():
            return
    if present := [*links, *(name for name in names if (out / name).exists())]:
        raise ConfigError(f"--out: {out / present[0]} is not of an earlier report, and would be replaced; name another")


def write_results(results: Results, out: Path) -> None:
    """Write results.json and its renderings into a folder, and delete the saved stages of an interrupted run.

    Raises:
        ConfigError: the folder cannot be written.
    """
    check_report_folder(out)
    make_folder(out)
    try:
        write_json(out / "results.json", results.to_dict())
        write_text(out / "report.md", render_markdown(results))
        write_text(out / "report.html", render_html(results))
        write_plots(results, out / "plots")
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {out}") from None
    remove(out / UNFINISHED)
