"""Check an evaluation request before any weights are loaded."""

import json
from pathlib import Path
from typing import Any

from linearize.checkpoint.student import Student
from linearize.checkpoint.writing import check_writable
from linearize.errors import ConfigError
from linearize.evaluation.suite import Suite, within_positions
from linearize.evaluation.text import read_evaluation_text
from linearize.report.gates import check_common, check_gates, expand_gates, read_older


def check_request(
    suite: Suite,
    window: int,
    *,
    gates: list[str] | None = None,
    min_recovery: float | None = None,
    compare: Path | None = None,
    summary_file: Path | None = None,
) -> tuple[list[str], dict | None, dict[str, Any]]:
    """What is asked for and needs no weights to be refused: the gates, the older results and the harness's tasks.

    Args:
        window: the student's; within it there is nothing to recover.

    Raises:
        ConfigError: a gate on what is not measured, an unreadable file, an unknown task.
    """
    from linearize.evaluation.harness import load_tasks
    from linearize.evaluation.letters import read_items

    expressions = expand_gates(list(gates or []))
    check_recovery(min_recovery, suite, window)
    check_gates(expressions, suite.figures(), open_ended=bool(suite.tasks))
    older = read_older(compare) if compare else None
    if older is not None and not suite.tasks:
        check_common(older, suite.figures())
    if summary_file is not None:
        check_writable(summary_file, "--summary-file", folder=False)
    if suite.control is not None:
        Student.read(suite.control)
    for path in suite.choice:
        read_items(Path(path), suite.task_limit)
    tasks = load_tasks(suite.tasks, Path(suite.tasks_dir) if suite.tasks_dir else None) if suite.tasks else {}
    return expressions, older, tasks


def check_recovery(asked: float | None, suite: Suite, window: int) -> None:
    if asked is not None and not lengths_beyond_window(suite, window):
        raise ConfigError(
            f"--min-recovery: got {asked}, but perplexity is measured at "
            f"{', '.join(map(str, suite.lengths)) or 'no length'}, and only beyond the window of {window} is there "
            "anything to recover"
        )


def lengths_beyond_window(suite: Suite, window: int) -> list[int]:
    """The lengths at which there is something to recover."""
    return [length for length in suite.lengths if length > window]


def check_text(
    model: Path, suite: Suite, *, gates: list[str], min_recovery: float | None = None, compare: Path | None = None
) -> None:
    """What needs a conversion to be refused, though no weights: text, older results of other text, and gates on what its
    positions do not hold. Arguments as in `evaluate`.

    Raises:
        ConfigError: one of these.
    """
    from linearize.device import compute_dtype, pick_device
    from linearize.modeling.loading import load_tokenizer

    # a conversion has its base's positions
    suite, _ = within_positions(suite, json.loads((model / "config.json").read_bytes()))
    check_recovery(min_recovery, suite, Student.read(model).manifest.settings.window)
    check_gates(expand_gates(gates), suite.figures(), open_ended=bool(suite.tasks))
    older = read_older(compare) if compare else None
    read_evaluation_text(suite, load_tokenizer(model), older, compute_dtype("auto"), pick_device())
