"""Run benchmarks of lm-evaluation-harness, by its own task names or from a folder of task files, one model at a time.

The base's answers are cached on disk under its fingerprint, so that a second student of the same base costs half.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.auto import trusts_code
from linearize.checkpoint.fingerprint import fingerprint_of, tokenizer_fingerprint
from linearize.checkpoint.hub import HUB_SECONDS, hub_answers
from linearize.checkpoint.result_cache import cached_on_disk
from linearize.errors import ConfigError, nearest, one_line
from linearize.evaluation.measurement import Measurement, Option, Stage
from linearize.report.results import ANSWERING_MODELS, BASE, STUDENT, StageResult, make_metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linearize.evaluation.context import EvaluationContext
    from linearize.evaluation.suite import Suite

# the harness's names of scores per item; the first that a task has is reported. Higher is better in all of them:
# perplexities and other scores that are better when lower are left out. A task file's `higher_is_better` is not read.
ITEM_SCORES = ("acc", "acc_norm", "exact_match", "prompt_level_strict_acc", "f1")
# requests of like length that go through a model together
BATCH = 4


class Tasks(Measurement):
    """Scores on tasks of lm-evaluation-harness. A task's metrics are known when it has run."""

    name = "tasks"
    options = (
        Option("tasks", str, ()),
        Option("tasks_dir", str, None),
        # items of each task, and of each file of multiple-choice questions
        Option("task_limit", int, None, least=1),
    )
    has_open_metrics = True

    def prepare(self, suite: Suite) -> dict[str, Any]:
        if not suite.tasks:
            return {}
        return load_tasks(suite.tasks, Path(suite.tasks_dir) if suite.tasks_dir else None)

    def fingerprint(self, suite: Suite, inputs: dict[str, Any]) -> list[str]:
        return [task_fingerprint(task, suite.task_limit) for task in inputs.values()]

    def stages(self, suite: Suite, inputs: dict[str, Any]) -> Iterator[Stage]:
        for name, task in inputs.items():
            yield Stage(f"task {name}", partial(measure_task, name=name, task=task, limit=suite.task_limit))


def load_tasks(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    """Load the harness's task objects with their data, groups expanded, before any model is loaded.

    Args:
        folder: task files to use in place of the harness's own.

    Returns:
        Task objects by name.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, its data cannot be had, or it has no score per item.
    """
    if folder is not None:
        _refuse_code(folder)
    tasks = _load_with_data(names, folder)
    for name, task in tasks.items():
        if not set(task.aggregation()) & set(ITEM_SCORES):
            raise ConfigError(f"--tasks: {name} scores none of {', '.join(ITEM_SCORES)} item by item")
    return tasks


def _refuse_code(folder: Path) -> None:
    """Refuse task files that name Python functions, unless the user trusts what they bring.

    Raises:
        ConfigError: the first of them.
    """
    for path in sorted(folder.rglob("*.yaml")) + sorted(folder.rglob("*.yml")):
        if not trusts_code() and path.is_file() and "!function" in path.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(f"--tasks-dir: {path} runs code of its own (!function); --trust-remote-code runs it")


def _load_with_data(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    """Return the task objects by name, with their data: from this machine if it has them, else from the hub.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    manager = _task_manager(folder)
    for name in names:
        if name not in manager.all_tasks:
            known = ", ".join(manager.all_tasks) if folder else "lm-evaluation-harness's"
            raise ConfigError(f"--tasks: no task '{name}', allowed are {known}{nearest(name, manager.all_tasks)}")
    # local and cached data need no hub, which is asked only if they are not enough
    with _offline(), contextlib.suppress(Exception):
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
    """Return a digest that changes with a task's settings, its items and the examples that stand before them."""
    examples = task.fewshot_docs() if task.config.num_fewshot else None
    return fingerprint_of([task.dump_config(), [*itertools.islice(task.eval_docs, limit)], [*(examples or ())], limit])


def measure_task(context: EvaluationContext, name: str, task: Any, limit: int | None) -> StageResult:
    """Run one task for every model, and make a metric of each of its scores.

    The models are base, student and window + sinks, and of the other `ANSWERING_MODELS` those that the suite asks for.
    """
    cache_key = {
        "base": context.base_fingerprint,
        "tokenizer": tokenizer_fingerprint(context.tokenizer),
        "task": task_fingerprint(task, limit),
        "seed": context.seed,
        "batch": BATCH,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }

    def evaluate_model(model_name: str, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        def evaluate_and_report() -> dict[str, dict[str, Any]]:
            scores = _run_lm_eval(context, model, name, task, limit)
            context.progress(f"{name}: {model_name} done")
            return scores

        def report_cached() -> None:
            context.progress(f"{name}: base results read from the cache")

        if model_name != BASE:
            return evaluate_and_report()
        base_key = {**cache_key, "dtype": str(model.dtype)}
        return cached_on_disk("tasks", base_key, evaluate_and_report, on_hit=report_cached)

    scores = context.for_each_model(ANSWERING_MODELS, evaluate_model)
    items = [*itertools.islice(task.eval_docs, limit)]
    data = f"{name} {fingerprint_of(items)[:16]}, limit {limit}"
    metrics = []
    for metric, record in scores[STUDENT].items():
        item_scores = {model_name: records[metric]["units"] for model_name, records in scores.items()}
        # items that are right or wrong are compared by McNemar's test
        right_or_wrong = all(score in (0.0, 1.0) for model_scores in item_scores.values() for score in model_scores)
        metrics.append(
            make_metric(metric, "higher", item_scores, chance=record["chance"], items=right_or_wrong, data=data)
        )
    return StageResult(metrics=tuple(metrics))


def _run_lm_eval(
    context: EvaluationContext, model: PreTrainedModel, name: str, task: Any, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run a task with one model and collect a score for each of its items.

    The harness extracts answers from the model's text by filters. A task with several filters (GSM8K: strict and
    flexible) has a metric for each.

    Args:
        name: the task's name.
        limit: number of items at most; None for all.

    Returns:
        A record by metric. The metric is named `<task>_<score>`, or `<task>_<score>_<filter>` if there are several
        filters. In its record, "units" is the list of scores in the order of the items, and "chance" is the mean score
        of guessing, None if unknown.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # the task is loaded already; without this empty index every call would index the harness's thousands of tasks
    manager = TaskManager(include_defaults=False)
    seed = context.seed
    wrapped = HFLM(pretrained=model, tokenizer=context.tokenizer, batch_size=BATCH, backend="causal")
    report = simple_evaluate(
        model=wrapped, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    by_filter = defaultdict(list)
    for sample in sorted(report["samples"][name], key=lambda sample: sample["doc_id"]):
        by_filter[sample["filter"]].append(sample)
    records = {}
    for filter_name, samples in by_filter.items():
        score = next((key for key in ITEM_SCORES if isinstance(samples[0].get(key), int | float)), None)
        if score is None:
            raise ConfigError(f"--tasks: {name} scores none of {', '.join(ITEM_SCORES)} item by item")
        metric = f"{name}_{score}" + (f"_{filter_name}" if len(by_filter) > 1 else "")
        item_scores = [float(sample[score]) for sample in samples]
        records[re.sub(r"\W", "_", metric)] = {"units": item_scores, "chance": _chance(samples, score)}
    return records


def _chance(samples: list[dict[str, Any]], score: str) -> float | None:
    """Return the mean score of guessing among each item's choices; None if the score is not accuracy over choices."""
    # the harness makes one request for each choice
    choices = [len(sample["arguments"]) for sample in samples]
    if score != "acc" or min(choices) <= 1:
        return None
    return sum(1 / count for count in choices) / len(choices)


def _task_manager(folder: Path | None) -> Any:
    """Return the harness's index of tasks: its own, or those of the task files in `folder` alone.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such folder.
    """
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
def _offline() -> Iterator[None]:
    """Let the libraries look at local files and their caches alone, without waiting for a network."""
    import datasets
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous


MEASUREMENT = Tasks()
