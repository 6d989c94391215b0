"""Run an evaluation stage by stage. Finished stages are saved, and an interrupted run goes on with the others."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.work_folder import claim, is_ours, temporary_folder
from linearize.checkpoint.writing import write_text
from linearize.errors import Interrupted
from linearize.evaluation.measurement import Stage
from linearize.evaluation.registry import MEASUREMENTS
from linearize.evaluation.suite import Suite
from linearize.report.results import StageResult

if TYPE_CHECKING:
    from linearize.evaluation.context import EvaluationContext


@contextlib.contextmanager
def work_folder(unfinished: Path | None) -> Iterator[Path]:
    """Yield a folder for files that stages share: `unfinished`, or a temporary one for None."""
    if unfinished is not None:
        yield unfinished
    else:
        with temporary_folder("eval") as folder:
            yield folder


def stages_of(suite: Suite, inputs: dict[str, Any]) -> Iterator[Stage]:
    """Yield the stages of a suite, the cheap and telling ones first.

    Args:
        inputs: what each measurement prepared, by its name.
    """
    for name, measurement in MEASUREMENTS.items():
        yield from measurement.stages(suite, inputs[name])


def run_stages(
    context: "EvaluationContext", stages: Iterable[Stage], identity: dict[str, Any], unfinished: Path | None
) -> list[StageResult]:
    """Run stages one after the other.

    Args:
        identity: JSON values that tell one evaluation from another: models, settings and data.
        unfinished: folder where the result of each finished stage is saved, and from where it is loaded when the
            identity is the same; None saves nothing.

    Raises:
        Interrupted: by the user.
    """
    import torch

    try:
        with torch.no_grad():
            return [_run_or_load(context, stage, identity, unfinished) for stage in stages]
    except KeyboardInterrupt:
        hint = "; the finished parts are saved, and the same command goes on" if unfinished else ""
        raise Interrupted(f"interrupted{hint}") from None


def _run_or_load(
    context: "EvaluationContext", stage: Stage, identity: dict[str, Any], unfinished: Path | None
) -> StageResult:
    if unfinished is None:
        return _parsed(json.dumps(asdict(stage.run(context))))
    path = unfinished / f"{fingerprint_of({**identity, 'stage': stage.name})}.json"
    if path.is_file() and is_ours(unfinished):
        context.progress(f"{stage.name}: loaded from an interrupted run")
        with contextlib.suppress(OSError, ValueError):  # a damaged one is measured again
            return _parsed(path.read_text(encoding="utf-8"))
    text = json.dumps(asdict(stage.run(context)))  # errors can be NaN, which pydantic would write as null
    claim(unfinished)
    write_text(path, text)
    return _parsed(text)


def _parsed(text: str) -> StageResult:
    """Read a saved result. Every result goes this way, so that an interrupted run ends in the same bytes."""
    return TypeAdapter(StageResult).validate_python(json.loads(text))
