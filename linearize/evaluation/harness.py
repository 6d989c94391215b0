"""Benchmarks of lm-evaluation-harness, by its own task names or from a folder of task files, one model at a time.

The base's answers are kept under its fingerprint, so that a second student of the same base costs half.
"""

import contextlib
import importlib.metadata
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import fingerprint_of, tokenizer_fingerprint
from linearize.checkpoint.hub import HUB_SECONDS, hub_answers
from linearize.checkpoint.result_cache import cached_on_disk
from linearize.errors import ConfigError, nearest, one_line
from linearize.evaluation.lab import Lab
from linearize.report.results import ASKED, BASE, STUDENT, Findings, make_metric

# what the harness calls its per-item figures; the first that a task has leads
FIGURES = ("acc", "acc_norm", "exact_match", "prompt_level_strict_acc", "f1")
# requests of like length that go through a model together
BATCH = 4


def load_tasks(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    """The harness's task objects by name, groups opened, with their data: what cannot be had fails here, before a model
    is loaded.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, its data cannot be had, or it has no figure for an item.
    """
    tasks = _loaded(names, folder)
    for name, task in tasks.items():
        if not set(task.aggregation()) & set(FIGURES):
            raise ConfigError(f"--tasks: {name} scores none of {', '.join(FIGURES)} item by item")
    return tasks


def _loaded(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    manager = _manager(folder)
    for name in names:
        if name not in manager.all_tasks:
            known = ", ".join(manager.all_tasks) if folder else "lm-evaluation-harness's"
            raise ConfigError(f"--tasks: no task '{name}', allowed are {known}{nearest(name, manager.all_tasks)}")
    # local and cached data need no hub; only where they are not enough is it asked for
    with _hub_left_alone(), contextlib.suppress(Exception):
        return manager.load(list(names))["tasks"]
    if not hub_answers():
        raise ConfigError(
            f"--tasks: the data of {', '.join(names)} are not on this machine, and the hub did not answer within "
            f"{HUB_SECONDS} s; give task files with local data by --tasks-dir"
        )
    try:
        return manager.load(list(names))["tasks"]
    except Exception as error:  # the harness and its libraries raise their own
        raise ConfigError(f"--tasks: {', '.join(names)} cannot be loaded: {one_line(error, 200)}") from None


def task_fingerprint(task: Any, limit: int | None) -> str:
    """Changes with a task's settings, its items and the examples that stand before them."""
    examples = task.fewshot_docs() if task.config.num_fewshot else None
    return fingerprint_of([task.dump_config(), [*itertools.islice(task.eval_docs, limit)], [*(examples or ())], limit])


def measure_task(lab: Lab, name: str, task: Any, limit: int | None, base_fingerprint: str) -> Findings:
    """One task for base, student, window + sinks and the baselines asked for."""
    data = fingerprint_of([*itertools.islice(task.eval_docs, limit)])
    key = {
        "base": base_fingerprint,
        "tokenizer": tokenizer_fingerprint(lab.tokenizer),
        "task": task_fingerprint(task, limit),
        "seed": lab.seed,
        "batch": BATCH,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }

    def answers(model_name: str, model) -> dict[str, dict[str, Any]]:
        def ask() -> dict[str, dict[str, Any]]:
            found = _run(lab, model, name, task, limit)
            lab.progress(f"{name}: {model_name} done")
            return found

        if model_name != BASE:
            return ask()
        of_dtype = {**key, "dtype": str(model.dtype)}
        return cached_on_disk("tasks", of_dtype, ask, lambda: lab.progress(f"{name}: the base's answers are at hand"))

    found = lab.measure(ASKED, answers)
    metrics = []
    for figure, record in found[STUDENT].items():
        units = {model_name: figures[figure]["units"] for model_name, figures in found.items()}
        items = all(value in (0.0, 1.0) for values in units.values() for value in values)
        metrics.append(
            make_metric(
                figure, "higher", units, chance=record["chance"], items=items, data=f"{name} {data[:16]}, limit {limit}"
            )
        )
    return Findings(metrics=tuple(metrics))


def _run(lab: Lab, model, name: str, task, limit: int | None) -> dict[str, dict[str, Any]]:
    """By "<task>_<figure>" the per-item units in the order of the items, and what guessing scores.

    A task that reads its answers in several ways (GSM8K: strict and flexible) has a figure for each.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=lab.tokenizer, batch_size=BATCH, backend="causal")
    found = simple_evaluate(
        model=wrapped, tasks=[task], limit=limit, bootstrap_iters=0, log_samples=True, random_seed=lab.seed,
        numpy_random_seed=lab.seed, torch_random_seed=lab.seed, fewshot_random_seed=lab.seed,
    )  # fmt: skip
    by_filter = defaultdict(list)
    for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]):
        by_filter[sample["filter"]].append(sample)
    answers = {}
    for reading, samples in by_filter.items():
        figure = next((key for key in FIGURES if isinstance(samples[0].get(key), int | float)), None)
        if figure is None:
            raise ConfigError(f"--tasks: {name} scores none of {', '.join(FIGURES)} item by item")
        choices = [len(sample["arguments"]) for sample in samples]
        chance = sum(1 / n for n in choices) / len(choices) if figure == "acc" and min(choices) > 1 else None
        title = f"{name}_{figure}" + (f"_{reading}" if len(by_filter) > 1 else "")
        units = [float(sample[figure]) for sample in samples]
        answers[re.sub(r"\W", "_", title)] = {"units": units, "chance": chance}
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


@contextlib.contextmanager
def _hub_left_alone() -> Iterator[None]:
    """Inside, the libraries look at local files and their caches alone, without waiting for a network."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
