"""Run an evaluation stage by stage; finished stages are saved and reused after an interruption."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of
from linearize.checkpoint.writing import write_text
from linearize.errors import ConfigError, Interrupted
from linearize.evaluation.suite import Suite
from linearize.report.results import Findings


@contextlib.contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """Where stages put what has to outlive a model: beside the finished stages, or a temporary folder."""
    if kept is not None:
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="linearize-eval-") as folder:
            yield Path(folder)


def stages_of(suite: Suite, tasks: dict[str, Any], base_fingerprint: str) -> Iterator[tuple[str, Callable]]:
    """What the suite asks for, cheap and telling first: (name, function of the lab)."""
    from linearize.evaluation.branch_use import measure_branch_share
    from linearize.evaluation.efficiency import measure_efficiency
    from linearize.evaluation.generation import measure_generation
    from linearize.evaluation.harness import measure_task
    from linearize.evaluation.letters import measure_letters
    from linearize.evaluation.parity import measure_parity
    from linearize.evaluation.passkey import measure_passkey
    from linearize.evaluation.perplexity import measure_perplexity
    from linearize.evaluation.recall import measure_recall

    if suite.parity:
        yield "parity", measure_parity
    for length in suite.lengths:
        window_off = suite.branch and length == max(suite.lengths)
        yield (
            f"perplexity@{length}",
            partial(measure_perplexity, length=length, max_tokens=suite.max_tokens, window_off=window_off),
        )
    for kind, distances in (("recall", suite.recall), ("associative", suite.associative)):
        for distance in distances:
            window_off = suite.branch and kind == "recall" and distance == max(distances)
            yield (
                f"{kind}@{distance}",
                partial(measure_recall, kind=kind, distance=distance, rows=suite.recall_rows, window_off=window_off),
            )
    for length in suite.passkey:
        yield f"passkey@{length}", partial(measure_passkey, length=length, rows=suite.passkey_rows)
    if suite.branch:
        yield "branch", partial(measure_branch_share, length=suite.branch_length)
    if suite.generation:
        yield "generation", partial(measure_generation, tokens=suite.generation)
    for path in suite.choice:
        yield f"choice {path}", partial(measure_letters, path=Path(path), limit=suite.task_limit)
    for name, task in tasks.items():
        yield (
            f"task {name}",
            partial(measure_task, name=name, task=task, limit=suite.task_limit, base_fingerprint=base_fingerprint),
        )
    if suite.efficiency:
        yield "efficiency", partial(measure_efficiency, lengths=suite.efficiency)


def run_stages(
    lab: Any, stages: Iterable[tuple[str, Callable]], identity: dict, unfinished: Path | None
) -> list[Findings]:
    """What the stages find, one after the other. In the folder `unfinished` a finished one is kept, and taken from there where
    models and settings, `identity`, are the same.

    Raises:
        Interrupted: by the user.
    """
    import torch

    try:
        with torch.no_grad():
            return [_run_once(lab, name, run, identity, unfinished) for name, run in stages]
    except KeyboardInterrupt:
        done = "; the parts that are finished are kept, and the same command goes on" if unfinished else ""
        raise Interrupted(f"interrupted{done}") from None


def _run_once(lab: Any, name: str, run: Callable, identity: dict, unfinished: Path | None) -> Findings:
    from pydantic import TypeAdapter

    if unfinished is None:
        return run(lab)
    path = unfinished / f"{fingerprint_of({**identity, 'stage': name})}.json"
    if path.is_file():
        lab.progress(f"{name}: kept from an interrupted run")
        return TypeAdapter(Findings).validate_python(json.loads(path.read_bytes()))
    found = run(lab)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(found)))  # errors can be NaN, which pydantic would write as null
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {unfinished.parent}") from None
    return found
