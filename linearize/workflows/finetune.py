"""Recovery: train adapters and the added parameters of a converted checkpoint towards its base model.

1. Resolve the student, the recipe and the output; refuse what cannot train.
2. Open the data of every stage, and read their first rows.
3. Resume an unfinished run, if it was started with the same settings, or discard it.
4. Load the student with its adapters. It is its own teacher, in softmax mode with the adapters off, wherever it can be.
5. Train stage after stage (training/loop.py).
6. Write the adapter and the merged checkpoint, which loads like a converted one.

Step 1 runs before the imports that take seconds. Every process goes through the steps; the first one alone writes.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.manifest import Manifest
from linearize.checkpoint.names import MANIFEST, METRICS
from linearize.checkpoint.output_folder import atomic_folder, check_target, without_new_parents
from linearize.checkpoint.outputs import default_output
from linearize.checkpoint.source import local_fingerprint
from linearize.checkpoint.student import Student
from linearize.checkpoint.work_folder import alone_in, check_free, claim, remove
from linearize.checkpoint.writing import check_space, copy_file, write_json, write_text
from linearize.data.documents import check_dataset, data_fingerprint
from linearize.device import versions
from linearize.errors import ConfigError
from linearize.report.card import conversion_card
from linearize.settings.loading import load_recipe
from linearize.settings.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from linearize.training.loop import StepRecord, TrainingRun
    from linearize.training.schedule import ScheduledStage

# keys of the parent's linearize.json that do not hold for a trained checkpoint
OWN_KEYS = ("verification", "sha256", "finetune")


def finetune(
    model: Path | str | Student,
    recipe: Recipe | str | Path = "lora",
    *,
    recipe_name: str | None = None,
    out: Path | str | None = None,
    teacher: str | None = None,
    restart: bool = False,
    overwrite: bool = False,
    merge: bool = True,
    progress: Callable[[str], None] = print,
    report: "Callable[[StepRecord], None] | None" = None,
) -> Student:
    """Train a converted model to recover the quality of its base, and write the result as a checkpoint.

    A run that was stopped goes on where it was: call `finetune` again with the same arguments.

    Args:
        model: folder that `convert` wrote, or the `Student` that it returned.
        recipe: name of a packaged recipe (`linearize list recipes`), a YAML file, or a `Recipe`, as
            `load_recipe("lora", {"tokens": "1M", "data": ["corpus.jsonl"]})` makes one.
        recipe_name: name of the recipe in the records and in the default of `out`; by default that of the file.
        out: folder to write; by default linearized/NAME-RECIPE under the current folder.
        teacher: hub id, folder or .gguf file of another teacher than the base model, with the same tokenizer.
        restart: discard an unfinished run instead of resuming it.
        overwrite: replace a checkpoint that stands at `out`.
        merge: write a complete checkpoint beside the adapter; otherwise `out` holds the adapter and needs its parent.
        progress: receives one line of text at a time.
        report: receives the record of every optimizer step.

    Returns:
        The written checkpoint: its folder, and its manifest with losses, tokens and time under `finetune`.

    Raises:
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP; the state is saved.
        LinearizeError: every other foreseen failure, with its exit code.

    Example:
        >>> import linearize
        >>> recipe = linearize.Recipe(tokens=2048, seq_len=256, batch_size=2)
        >>> tuned = linearize.finetune("my-student", recipe, out="my-student-lora")
        >>> tuned.kind
        'finetuned'
    """
    student = model if isinstance(model, Student) else Student.read(model)
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    name = recipe_name or ("recipe" if isinstance(recipe, Recipe) else str(recipe))
    target = Path(out) if out else default_output(_name_of(student), Path(name).stem)
    job = _Job(student, settings, name, teacher, target, merge, overwrite)
    _check(job)
    with without_new_parents(target.absolute().parent):
        return _run(job, restart, progress, report or _ignore)


@dataclass(frozen=True)
class _Job:
    """A request: the student, how it is trained, and what is written where."""

    student: Student
    recipe: Recipe
    recipe_name: str
    teacher: str | None
    out: Path
    merge: bool
    overwrite: bool

    @property
    def work(self) -> Path:
        """Folder of the unfinished run: metrics.jsonl and saved states."""
        return self.out.parent / f"{self.out.name}.training"

    def reads(self) -> list[Path]:
        """Return the local files and folders that the run reads, as far as they are named."""
        manifest = self.student.manifest
        named = [self.recipe_name, self.teacher, manifest.base.reference, *self.recipe.data]
        return [self.student.folder, *(path for name in named if name and (path := Path(name).expanduser()).exists())]


def _name_of(student: Student) -> str:
    """Return the name of the model that the student's folder is named after."""
    return student.folder.resolve().name.removesuffix("-converted")


def _ignore(message: Any) -> None:
    """Take a message or a record that nobody asked for."""


def _check(job: _Job) -> None:
    """Refuse a request that cannot train or cannot be written.

    Raises:
        ConfigError: an adapter without its model, rows of a wrong length, or an output that may not be written.
        ResourceError: the disk has no room for the merged checkpoint.
    """
    student, settings = job.student, job.student.manifest.settings
    if student.is_adapter_only:
        raise ConfigError(f"MODEL: {student.folder} holds an adapter only; finetune its parent {student.parent_folder}")
    positions = student.read_config().get("max_position_embeddings")
    longest = max(stage.seq_len for stage in job.recipe.resolved_stages())
    if positions and longest > positions:
        raise ConfigError(f"seq_len: got {longest}, the model has {positions} positions")
    job.recipe.check_leaves_window(settings.mix, settings.window, settings.sinks)
    if job.out.resolve() == student.folder.resolve():
        raise ConfigError(f"--out: got {job.out}, the checkpoint that is to be trained; name another folder")
    for name in job.recipe.data:
        check_dataset(name)
    check_target(job.out, overwrite=job.overwrite, reads=job.reads())
    if job.merge:
        check_space(job.out.parent, student.manifest.weights.bytes)


def _run(job: _Job, restart: bool, progress: Callable[[str], None], report: "Callable[[StepRecord], None]") -> Student:
    """Go through steps 2 to 6."""
    from accelerate.utils import broadcast_object_list, set_seed

    from linearize.modeling.loading import load_tokenizer
    from linearize.training.loop import TrainingRun, train_stages
    from linearize.training.schedule import schedule_stages
    from linearize.training.setup import make_accelerator, make_distiller, rows_of_stages

    student, recipe = job.student, job.recipe
    accelerator, dtype = make_accelerator(recipe.precision)
    is_main = accelerator.is_main_process
    if not is_main:
        progress = _ignore
    schedule = schedule_stages(recipe)
    rows = rows_of_stages(recipe, schedule, load_tokenizer(student.folder), student.manifest.settings.window)
    fingerprint = run_fingerprint(student, recipe, job.teacher, accelerator.num_processes)
    if is_main:
        check_free(job.work, job.out)
        _resume_or_restart(job.work, fingerprint, schedule[-1].total_steps, restart, progress)
    accelerator.wait_for_everyone()
    set_seed(recipe.seed)
    distiller = make_distiller(student, recipe, schedule, job.teacher, dtype, accelerator.device)
    progress(
        f"{job.recipe_name}: {distiller.trainable_parameters:,} trainable parameters, {_steps_of(schedule)}, "
        f"{str(dtype).removeprefix('torch.')} on {accelerator.device}"
    )
    if is_main:
        claim(job.work)
    accelerator.wait_for_everyone()
    run = TrainingRun(recipe, distiller, accelerator, job.work, fingerprint, report)
    started = time.monotonic()
    with alone_in(job.work, job.out) if is_main else contextlib.nullcontext():
        trained_tokens = train_stages(run, schedule, rows)
    seconds = time.monotonic() - started
    document = _write(job, run, schedule, dtype, trained_tokens, seconds) if is_main else None
    (document,) = broadcast_object_list([document])
    return Student(job.out, Manifest.from_document(document))


def run_fingerprint(student: Student, recipe: Recipe, teacher: str | None, processes: int) -> dict[str, Any]:
    """Return everything that decides what training computes."""
    return {
        "base": student.manifest.base.fingerprint,
        "plan": student.manifest.plan_fingerprint,
        "student": local_fingerprint(str(student.folder)),
        "teacher": teacher and [teacher, local_fingerprint(teacher)],
        "recipe": recipe.model_dump(exclude={"description", "checkpoint_every"}),
        "data": data_fingerprint(recipe.data),
        "processes": processes,
    }


def _resume_or_restart(
    work: Path, fingerprint: dict[str, Any], steps: int, restart: bool, progress: Callable[[str], None]
) -> None:
    """Discard an unfinished run, or announce its resumption.

    Args:
        steps: of the whole run.

    Raises:
        ConfigError: the unfinished run was started with other settings, or is damaged.
    """
    from linearize.training.state import check_metrics, check_same_run, damaged_states, saved_states, step_of

    if restart:
        claim(work)
        remove(work)
    for name, fault in damaged_states(work).items():
        progress(f"{work.name}: state {name} is passed over: {fault}")
    if states := saved_states(work):
        check_same_run(states[-1], fingerprint)
        if step_of(states[-1]) > steps:
            raise ConfigError(
                f"{work / states[-1].name} is of a step that this run of {steps} does not have; remove it, or discard "
                "the run with --restart"
            )
        check_metrics(work / METRICS, step_of(states[-1]))
        progress(f"resuming {work.name} after step {step_of(states[-1])}")


def _steps_of(schedule: "list[ScheduledStage]") -> str:
    """Describe the steps of a run: 10 steps (transfer 3 of 2 x 48, then distill 7 of 2 x 48 tokens)."""
    stages = [f"{each.stage.name} {each.steps} of {each.stage.batch_size} x {each.stage.seq_len}" for each in schedule]
    return f"{schedule[-1].total_steps} steps ({', then '.join(stages)} tokens)"


def _write(
    job: _Job,
    run: "TrainingRun",
    schedule: "list[ScheduledStage]",
    dtype: "torch.dtype",
    trained_tokens: int,
    seconds: float,
) -> dict[str, Any]:
    """Write the checkpoint, remove the work folder, and return linearize.json.

    Args:
        dtype: the dtype that the model trained in.
        trained_tokens, seconds: tokens trained in this call, and the time it took.
    """
    from linearize.training.output import run_figures, write_adapter, write_merged

    parent, metrics = job.student, job.work / METRICS
    document = {key: value for key, value in parent.manifest.to_dict().items() if key not in OWN_KEYS}
    document |= {
        "kind": "finetuned" if job.merge else "adapter",
        "finetune": {
            "recipe_name": job.recipe_name,
            "recipe": job.recipe.model_dump(),
            "parent": str(parent.folder.resolve()),
            "parent_fingerprint": run.fingerprint["student"],
            "teacher": job.teacher or "base model",
            "trainable_parameters": run.distiller.trainable_parameters,
            **run_figures(metrics, schedule, trained_tokens, seconds),
            "processes": run.fingerprint["processes"],
            "data_fingerprint": run.fingerprint["data"],
        },
        "versions": versions(),
    }
    adapted = run.distiller.student
    with atomic_folder(job.out, overwrite=job.overwrite, reads=job.reads()) as folder:
        copy_file(metrics, folder / METRICS)
        write_adapter(folder, adapted)
        if job.merge:
            hashes = write_merged(folder, parent, adapted, job.recipe, dtype)
            write_text(folder / "README.md", conversion_card(Manifest.from_document(document), parent.folder))
            document["sha256"] = hashes
        write_json(folder / MANIFEST, document)
    remove(job.work)
    return document
