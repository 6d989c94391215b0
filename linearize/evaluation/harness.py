"""Benchmarks of lm-evaluation-harness, by its own task names or from a folder of task files, one model at a time.

The base's answers are kept under its fingerprint, so that a second student of the same base costs half.
"""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of, sha256
from linearize.checkpoint.writing import write_json
from linearize.errors import ConfigError
from linearize.evaluation.lab import Lab
from linearize.report.results import BASE, STUDENT, WINDOW, Findings, make_metric

MODELS = (BASE, STUDENT, WINDOW)
# what the harness calls its per-item figures; the first that a task has leads
FIGURES = ("acc", "acc_norm", "exact_match", "prompt_level_strict_acc", "f1")


def measure_tasks(
    lab: Lab, tasks: tuple[str, ...], folder: Path | None, limit: int | None, base_fingerprint: str
) -> Findings:
    """Every task for base, student and window + sinks.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    manager = _manager(folder)
    _check_known(tasks, manager, folder)
    key = {
        "base": base_fingerprint,
        "tasks": sorted(tasks),
        "files": sha256([p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()]) if folder else None,
        "limit": limit,
        "seed": lab.seed,
        "dtype": str(lab.reference.dtype),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    kept = _cache_folder() / f"{fingerprint_of(key)}.json"
    answers: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        if name == BASE and kept.is_file():
            answers[name] = json.loads(kept.read_bytes())
            lab.progress("tasks: the base's answers are at hand")
            continue
        model, mode = lab.modes()[name]
        with mode():
            answers[name] = _run(lab, model, tasks, manager, limit)
        lab.progress(f"tasks: {name} done")
        if name == BASE:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, answers[name])
    metrics = []
    for figure, record in answers[STUDENT].items():
        units = {name: answers[name][figure]["units"] for name in MODELS}
        items = all(value in (0.0, 1.0) for values in units.values() for value in values)
        metrics.append(make_metric(figure, "higher", units, chance=record["chance"], items=items))
    return Findings(metrics=tuple(metrics))


def _run(lab: Lab, model, tasks, manager, limit: int | None) -> dict[str, dict[str, Any]]:
    """ "<task>_<figure>" -> per-item units in the order of the items, and what guessing scores."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=lab.tokenizer, batch_size=1, backend="causal")
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
            random_seed=lab.seed, numpy_random_seed=lab.seed, torch_random_seed=lab.seed, fewshot_random_seed=lab.seed,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"--tasks: {', '.join(tasks)} could not be run ({' '.join(str(error).split())[:200]}); without a hub, give "
            "task files with local data by --tasks-dir"
        ) from None
    answers = {}
    for task, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        figure = next((name for name in FIGURES if isinstance(samples[0].get(name), int | float)), None)
        if figure is None:
            raise ConfigError(f"--tasks: {task} scores none of {', '.join(FIGURES)} item by item")
        choices = [len(sample["arguments"]) for sample in samples]
        chance = sum(1 / n for n in choices) / len(choices) if figure == "acc" and min(choices) > 1 else None
        units = [float(sample[figure]) for sample in samples]
        answers[f"{task}_{figure}"] = {"units": units, "chance": chance}
    return answers


def _manager(folder: Path | None):
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("--tasks: lm-eval is not installed; pip install 'linearize[tasks]'") from None
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise ConfigError(f"--tasks-dir: no folder '{folder}'")
    return TaskManager(include_path=str(folder), include_defaults=False)


def _check_known(tasks: tuple[str, ...], manager, folder: Path | None) -> None:
    from linearize.errors import nearest

    for task in tasks:
        if task not in manager.all_tasks:
            known = ", ".join(manager.all_tasks) if folder else "lm-evaluation-harness's"
            raise ConfigError(f"--tasks: no task '{task}', allowed are {known}{nearest(task, manager.all_tasks)}")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "linearize" / "tasks"
