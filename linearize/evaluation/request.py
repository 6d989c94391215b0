"""Check an evaluation request before any weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.output_folder import check_writable
from linearize.checkpoint.source import read_config
from linearize.checkpoint.student import Student
from linearize.device import compute_dtype, pick_device
from linearize.errors import ConfigError
from linearize.evaluation.registry import MEASUREMENTS
from linearize.evaluation.suite import Suite, cut_to_positions
from linearize.evaluation.text import read_evaluation_text
from linearize.modeling.loading import load_tokenizer
from linearize.report.comparison import OlderResults, check_common, read_older
from linearize.report.gates import check_gates, expand_gates


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        gates: expressions, files of them expanded.
        min_recovery: least recovery of perplexity at every length beyond the window.
        older: results of an earlier run to compare with.
        inputs: what each measurement read from its files, by the measurement's name.
    """

    gates: list[str]
    min_recovery: float | None
    older: OlderResults | None
    inputs: dict[str, Any]


def check_request(
    suite: Suite,
    window: int,
    gates: Sequence[str] | None = None,
    min_recovery: float | None = None,
    *,
    compare: Path | None = None,
    summary_file: Path | None = None,
) -> Request:
    """Read and check everything in a request that needs no conversion: gates, older results and measurements' files.

    Args:
        window: the student's; within it there is nothing to recover.

    Raises:
        ConfigError: a gate on what is not measured, an unreadable file, an unknown task.
    """
    expressions = expand_gates(gates or ())
    check_recovery(min_recovery, suite, window)
    metrics = suite.metrics()
    check_gates(expressions, metrics, open_ended=suite.has_open_metrics)
    older = read_older(compare) if compare else None
    if older is not None and not suite.has_open_metrics:
        check_common(older, metrics)
    if summary_file is not None:
        check_writable(summary_file, "--summary-file", folder=False)
    if suite.control is not None:
        Student.read(suite.control)
    inputs = {name: measurement.prepare(suite) for name, measurement in MEASUREMENTS.items()}
    return Request(expressions, min_recovery, older, inputs)


def check_recovery(min_recovery: float | None, suite: Suite, window: int) -> None:
    """Refuse a least recovery where no length is beyond the window.

    Raises:
        ConfigError: nothing can be recovered.
    """
    if min_recovery is not None and not lengths_beyond_window(suite, window):
        raise ConfigError(
            f"--min-recovery: got {min_recovery}, but perplexity is measured at "
            f"{', '.join(map(str, suite.lengths)) or 'no length'}, and only beyond the window of {window} is there "
            "anything to recover"
        )


def lengths_beyond_window(suite: Suite, window: int) -> list[int]:
    """Return the lengths at which there is something to recover."""
    return [length for length in suite.lengths if length > window]


def check_text(
    model: Path, suite: Suite, *, gates: Sequence[str], min_recovery: float | None = None, compare: Path | None = None
) -> None:
    """Check everything in a request that needs a conversion but no weights. Arguments as in `evaluate`.

    Raises:
        ConfigError: the text is too short, older results come from another text, or a gate is on something longer than
            the model's positions.
    """
    # a conversion has its base's positions
    suite, _ = cut_to_positions(suite, read_config(model))
    check_recovery(min_recovery, suite, Student.read(model).manifest.settings.window)
    check_gates(expand_gates(gates), suite.metrics(), open_ended=suite.has_open_metrics)
    older = read_older(compare) if compare else None
    read_evaluation_text(suite, load_tokenizer(model), older, compute_dtype("auto"), pick_device())
