"""Recovery: train LoRA and the added parameters of a converted checkpoint towards its base model.

1. Resolve recipe and student; refuse what cannot train.
2. Load the student once; it is its own teacher in softmax mode with LoRA off.
3. Resume or start; train (training/loop.py).
4. Write the adapter and the merged checkpoint, which loads like a converted one.
"""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.manifest import Manifest
from linearize.checkpoint.names import ADDED, MANIFEST, METRICS
from linearize.checkpoint.outputs import default_output
from linearize.checkpoint.source import local_fingerprint
from linearize.checkpoint.student import ADAPTER, UNTRAINED_FILE, Student
from linearize.checkpoint.writing import (
    alone_in,
    atomic_folder,
    check_free,
    check_space,
    check_target,
    make_folder,
    write_json,
    write_text,
)
from linearize.device import versions
from linearize.errors import ConfigError
from linearize.families.registry import FAMILIES
from linearize.plan import NO_BRANCH, LayerPlan, Plan
from linearize.settings.recipe import CHANGES_BASE, Recipe

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from linearize.data.packing import Batch
    from linearize.training.loop import Leg


def finetune(
    model: Path,
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path | None = None,
    teacher: str | None = None,
    restart: bool = False,
    overwrite: bool = False,
    merge: bool = True,
    progress: Callable[[str], None] = print,
    report: Callable[[Any], None] = print,
) -> dict[str, Any]:
    """Trains and writes; returns what linearize.json says, with the paths.

    Raises:
        LinearizeError: every foreseen failure. Interrupted: stopped by the user, the state is kept.
    """
    from accelerate.utils import set_seed

    from linearize.modeling.loading import load_tokenizer
    from linearize.training.loop import legs_of
    from linearize.training.model import Distiller, add_adapters

    source = Student.read(model)
    _check_recipe(recipe, source)
    out = out or default_output(model.resolve().name.removesuffix("-converted"), Path(recipe_name).stem)
    if out.resolve() == model.resolve():
        raise ConfigError(f"--out: got {out}, the checkpoint that is to be trained; name another folder")
    check_target(out, overwrite=overwrite)
    if merge:
        check_space(out.parent, source.manifest.weights.bytes)
    work = out.parent / f"{out.name}.training"

    accelerator, dtype = _accelerator(recipe.precision)
    main = accelerator.is_main_process
    if not main:
        progress = _silent
    legs = legs_of(recipe)
    rows = _rows_of_stages(recipe, legs, load_tokenizer(model), source.manifest.settings.window)
    fingerprint = run_fingerprint(source, recipe, teacher, accelerator.num_processes)
    if main:
        check_free(work, out)
        _resume_or_restart(work, fingerprint, restart, progress)
    accelerator.wait_for_everyone()

    set_seed(recipe.seed)
    student = _student(model, recipe, dtype)
    teacher_model = _teacher(source, recipe, teacher, dtype, accelerator.device)
    before_adapters = sum(leg.steps for leg in legs if leg.stage.loss.kind == "attention")
    adapter_steps = max(legs[-1].total - before_adapters, 1)
    adapted = add_adapters(student, recipe.lora, steps=adapter_steps).to(accelerator.device)
    distiller = Distiller(adapted, teacher_model, before_adapters)
    trainable = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    progress(
        f"{recipe_name}: {trainable:,} trainable parameters, {legs[-1].total} steps ("
        + ", then ".join(
            f"{leg.stage.name} {leg.steps} of {leg.stage.batch_size} x {leg.stage.seq_len}" for leg in legs
        )
        + f" tokens), {str(dtype).removeprefix('torch.')} on {accelerator.device}"
    )
    if main:
        make_folder(work)
    accelerator.wait_for_everyone()
    started = time.monotonic()
    with alone_in(work, out) if main else contextlib.nullcontext():
        trained = _train_stages(distiller, rows, recipe, legs, accelerator, work, fingerprint, report)
    if not main:
        accelerator.wait_for_everyone()
        return {}
    done = {
        "recipe_name": recipe_name,
        "recipe": recipe.model_dump(),
        "parent": str(model.resolve()),
        "parent_fingerprint": fingerprint["student"],
        "teacher": teacher or "base model",
        "trainable_parameters": trainable,
        **_measured(work / METRICS, legs, trained, time.monotonic() - started),
        "processes": accelerator.num_processes,
        "data_fingerprint": fingerprint["data"],
    }
    document = {
        **{
            key: value
            for key, value in source.manifest.to_dict().items()
            if key not in ("verification", "sha256", "finetune")
        },
        "kind": "finetuned" if merge else "adapter",
        "finetune": done,
        "versions": versions(),
    }
    with atomic_folder(out, overwrite=overwrite) as folder:
        shutil.copyfile(work / METRICS, folder / METRICS)
        document |= _write_weights(folder, source, document, adapted, merge, _is_narrower(recipe, dtype, model))
        write_json(folder / MANIFEST, document)
    shutil.rmtree(work)
    accelerator.wait_for_everyone()
    return {"output": str(out.resolve()), **document}


def _accelerator(precision: str) -> "tuple[Accelerator, torch.dtype]":
    """Of this process, and what it computes in."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from linearize.device import compute_dtype

    dtype = compute_dtype(precision)
    # the precision is the process's, and an earlier run in it may have had another
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no"), dtype


def _rows_of_stages(recipe: Recipe, legs: "list[Leg]", tokenizer: Any, window: int) -> "list[Iterator[Batch]]":
    """What each stage trains on. Every dataset is opened and the first rows are read, so that bad data fails before anything
    is loaded or written."""
    from linearize.data.documents import open_dataset
    from linearize.data.packing import packed_rows, with_copies

    for name in recipe.data:
        open_dataset(name)
    rows = []
    for number, leg in enumerate(legs):
        packed = packed_rows(
            recipe.data,
            tokenizer,
            seq_len=leg.stage.seq_len,
            text_field=recipe.text_field,
            completion_only=leg.stage.loss.completion_only,
            seed=recipe.seed + number,
            shortest_document=recipe.shortest_document,
        )
        copying = with_copies(packed, leg.stage.copy_share, shortest=window, seed=recipe.seed + number)
        rows.append(itertools.chain([next(copying)], copying))
    return rows


def _resume_or_restart(work: Path, fingerprint: dict, restart: bool, progress: Callable[[str], None]) -> None:
    """Discards an unfinished run, or holds what it was started with against `fingerprint`."""
    from linearize.training.state import check_fingerprint, states

    if restart:
        shutil.rmtree(work, ignore_errors=True)
    if saved := states(work):
        record = json.loads((saved[-1] / "state.json").read_bytes())
        check_fingerprint(record["fingerprint"], fingerprint, work)
        progress(f"resuming {work.name} after step {record['step']}")


def _student(model: Path, recipe: Recipe, dtype: "torch.dtype") -> "PreTrainedModel":
    from linearize.modeling.loading import load_student

    student = load_student(model, dtype=dtype, quantization=recipe.quantization)
    student.config.use_cache = False
    if recipe.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.enable_input_require_grads()
    return student


def _train_stages(distiller, rows, recipe, legs, accelerator, work, fingerprint, report) -> int:
    """Every stage from where the work folder left off; returns the tokens trained in this call."""
    from linearize.training.loop import train
    from linearize.training.model import optimizers_of
    from linearize.training.state import states

    trained = 0
    try:
        for leg, leg_rows in zip(legs, rows):
            distiller.start(leg.stage)
            optimizers = optimizers_of(distiller, leg.stage.optimizer)
            losses = train(
                distiller, optimizers, leg_rows, recipe, leg, accelerator, work, fingerprint=fingerprint, report=report
            )
            trained += len(losses) * leg.stage.batch_size * leg.stage.seq_len
    finally:
        if accelerator.is_main_process and not states(work):  # nothing to go on from
            shutil.rmtree(work, ignore_errors=True)
    return trained


def _measured(metrics: Path, legs: "list[Leg]", trained: int, seconds: float) -> dict[str, Any]:
    """What linearize.json says of the run: tokens, steps and stages of the whole, losses of the last stage, seconds and what
    was trained in them of this call."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [step["loss"] for step in steps[legs[-1].before :]]  # of the last stage: stages measure different kinds
    return {
        "tokens": steps[-1]["tokens"],
        "steps": legs[-1].total,
        "stages": [{"name": leg.stage.name, "steps": leg.steps} for leg in legs],
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "seconds": seconds,
        "tokens_in_these_seconds": trained,
        "tokens_per_second": trained / seconds if trained else None,
    }


def _write_weights(
    folder: Path, parent: Student, document: dict[str, Any], adapted: Any, merge: bool, narrower: bool
) -> dict[str, Any]:
    """The adapter, and with `merge` a checkpoint that holds it; returns what the manifest says of its files.

    Args:
        narrower: the weights in `adapted` were rounded for training and are not what the adapter is added to.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file

    from linearize.modeling.loading import load_student, untrained_parameters
    from linearize.report.card import conversion_card

    adapted.save_pretrained(folder / ADAPTER)
    if not merge:
        return {}
    if narrower:
        adapted = PeftModel.from_pretrained(load_student(parent.folder, dtype=torch.float32), folder / ADAPTER)
    hashes = _write_merged(folder, parent.folder, adapted)
    if (untrained := untrained_parameters(parent)) is not None:
        save_file(untrained, folder / UNTRAINED_FILE)
    write_text(folder / "README.md", conversion_card(Manifest.from_document(document), parent.folder))
    return {"sha256": hashes}


def run_fingerprint(student: Student, recipe: Recipe, teacher: str | None, processes: int) -> dict[str, Any]:
    """Everything that decides what training computes."""
    from linearize.data.documents import data_fingerprint

    return {
        "base": student.manifest.base.fingerprint,
        "plan": student.manifest.plan_fingerprint,
        "student": local_fingerprint(str(student.folder)),
        "teacher": teacher and [teacher, local_fingerprint(teacher)],
        "recipe": recipe.model_dump(exclude={"description", "checkpoint_every"}),
        "data": data_fingerprint(recipe.data),
        "processes": processes,
    }


def _check_recipe(recipe: Recipe, student: Student) -> None:
    if student.is_adapter_only:
        raise ConfigError(f"MODEL: {student.folder} holds an adapter only; finetune its parent {student.parent_folder}")
    positions = student.read_config().get("max_position_embeddings")
    settings = student.manifest.settings
    longest = max(stage.seq_len for stage in recipe.resolved_stages())
    if positions and longest > positions:
        raise ConfigError(f"seq_len: got {longest}, the model has {positions} positions")
    check_leaves_window(recipe, settings.mix, settings.window, settings.sinks)


def check_leaves_window(recipe: Recipe, mix: str, window: int, sinks: int) -> None:
    """Refuses rows that end before the recurrent branch has anything to add."""
    shortest = min(stage.seq_len for stage in recipe.resolved_stages())
    if mix not in ("sum", NO_BRANCH) and shortest <= window + sinks:
        raise ConfigError(
            f"seq_len: got {shortest}, which never leaves the window of {window} keys and {sinks} sinks, so the recurrent "
            "branch would not train; use more"
        )


def _teacher(student: Student, recipe: Recipe, named: str | None, dtype, device):
    """A teacher of its own: the one named, or the base of a student whose own weights were already trained or which the
    adapters' start changes."""
    inside = student.kind == "converted" and recipe.lora.variant not in CHANGES_BASE
    if all(stage.loss.kind != "kl" for stage in recipe.resolved_stages()) or (named is None and inside):
        return None
    from linearize.modeling.loading import load_base, load_unconverted

    with student.open_base(named, option="--teacher") as source:
        config = source.read_config()
        family = FAMILIES.get(str(config.get("model_type")))
        if family is not None and family.masks_ignore_positions:  # under a plan that changes its masks alone
            every_head = tuple(range(family.heads(config)["num_key_value_heads"]))
            plan = Plan(family.model_type, (LayerPlan(every_head, native=True),) * config["num_hidden_layers"])
            teacher = load_unconverted(source, plan, dtype=dtype)
        else:
            teacher = load_base(source, dtype=dtype)
        teacher.to(device).requires_grad_(False)
    student_vocabulary = student.manifest.vocabulary
    if teacher.config.vocab_size != student_vocabulary:
        raise ConfigError(
            f"--teacher: '{named}' has a vocabulary of {teacher.config.vocab_size}, the student one of {student_vocabulary}; "
            "distillation needs the same tokenizer"
        )
    return teacher


def _write_merged(folder: Path, parent: Path, adapted) -> dict[str, str]:
    """The parent's files with merged weights, shard by shard, each tensor in its own dtype. Returns file hashes."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from linearize.checkpoint.assets import copy_assets
    from linearize.checkpoint.fingerprint import sha256
    from linearize.checkpoint.weights import INDEX, read_weights
    from linearize.modeling.export import PORTABLE_FILE
    from linearize.modeling.loading import merged

    weights = merged(adapted).state_dict()
    for file in read_weights(parent).files:
        with safe_open(parent / file, framework="pt") as shard:
            tensors = {}
            for name in shard.keys():
                original = shard.get_tensor(name)
                # a tied head that the checkpoint leaves out is not in the shard either
                tensors[name] = weights[name].to("cpu", original.dtype).contiguous() if name in weights else original
            save_file(tensors, folder / file, metadata={"format": "pt"})
    copy_assets(parent, folder, "config.json", PORTABLE_FILE, INDEX)
    return {name: sha256(folder / name) for name in ("config.json", INDEX) if (folder / name).is_file()}


def _is_narrower(recipe: Recipe, trained: "torch.dtype", parent: Path) -> bool:
    """Whether the model trained with fewer bits, of range or of fraction, than its parent's checkpoint has."""
    import torch

    from linearize.checkpoint.weights import FLOATING, read_weights

    if recipe.quantization:
        return True
    if recipe.lora.variant in CHANGES_BASE or trained.itemsize >= 4:
        return False
    own = {torch.bfloat16: "BF16", torch.float16: "F16"}[trained]
    kept = {info.dtype for name, info in read_weights(parent).tensors.items() if ADDED not in name}
    return bool(kept & FLOATING - {own})


def _silent(message: str) -> None:
    """What the other processes say."""
