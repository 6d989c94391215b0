"""Set up a training run: the device, the rows of every stage, the student, and its teacher."""

import itertools
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.checkpoint.source import Source
from linearize.checkpoint.student import Student
from linearize.data.documents import open_dataset
from linearize.data.packing import Batch, packed_rows, with_copies
from linearize.device import compute_dtype
from linearize.errors import ConfigError
from linearize.families.registry import FAMILIES
from linearize.modeling.loading import load_base, load_student, load_unconverted
from linearize.plan import LayerPlan, Plan
from linearize.settings.recipe import CHANGES_BASE, Recipe
from linearize.training.model import Distiller, add_adapters
from linearize.training.schedule import ScheduledStage


def make_accelerator(precision: str) -> tuple[Accelerator, torch.dtype]:
    """Return the accelerator of this process, and the dtype of weights and activations."""
    dtype = compute_dtype(precision)
    # the precision belongs to the process, and an earlier run in it may have had another
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no"), dtype


def rows_of_stages(
    recipe: Recipe, schedule: list[ScheduledStage], tokenizer: PreTrainedTokenizerBase, window: int
) -> list[Iterator[Batch]]:
    """Return the rows that each stage trains on.

    Every dataset is opened and the first row of each stage is read at once, so that bad data fail before anything is
    loaded or written.

    Args:
        window: the student's window; copies lie farther apart.

    Raises:
        ConfigError: a dataset cannot be read, or holds less than one row.
    """
    for name in recipe.data:
        open_dataset(name)
    rows_by_stage: list[Iterator[Batch]] = []
    for number, scheduled in enumerate(schedule):
        stage, seed = scheduled.stage, recipe.seed + number
        packed = packed_rows(
            recipe.data,
            tokenizer,
            seq_len=stage.seq_len,
            text_field=recipe.text_field,
            completion_only=stage.loss.completion_only,
            seed=seed,
            shortest_document=recipe.shortest_document,
        )
        rows = with_copies(packed, stage.copy_share, shortest=window, seed=seed)
        rows_by_stage.append(itertools.chain([next(rows)], rows))
    return rows_by_stage


def make_distiller(
    student: Student,
    recipe: Recipe,
    schedule: list[ScheduledStage],
    teacher: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Distiller:
    """Load the student with its adapters, and a teacher where it needs one of its own.

    Args:
        teacher: hub id, folder or GGUF file of another teacher than the base model.

    Raises:
        LinearizeError: student or teacher cannot be loaded, or do not fit the recipe.
    """
    model = _load_for_training(student, recipe, dtype)
    teacher_model = _load_teacher(student, recipe, teacher, dtype, device)
    steps_before_adapters = sum(each.steps for each in schedule if each.stage.loss.kind == "attention")
    adapter_steps = max(schedule[-1].total_steps - steps_before_adapters, 1)
    adapted = add_adapters(model, recipe.lora, steps=adapter_steps).to(device)
    return Distiller(adapted, teacher_model, steps_before_adapters)


def _load_for_training(student: Student, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """Load the student without a cache, with the recipe's quantization and gradient checkpointing."""
    model = load_student(student.folder, dtype=dtype, quantization=recipe.quantization)
    model.config.use_cache = False
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _load_teacher(
    student: Student, recipe: Recipe, override: str | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel | None:
    """Load a teacher of its own, or return None where the student's own instance teaches or nothing needs a teacher.

    The student cannot teach once its base weights have changed: after a finetune, or by the start of its adapters.
    """
    teaches_itself = override is None and student.kind == "converted" and recipe.lora.variant not in CHANGES_BASE
    if teaches_itself or all(stage.loss.kind != "kl" for stage in recipe.resolved_stages()):
        return None
    with student.open_base(override, option="--teacher") as source:
        teacher = _load_softmax_model(source, dtype).to(device).requires_grad_(False)
    vocabulary = student.manifest.vocabulary
    if teacher.config.vocab_size != vocabulary:
        raise ConfigError(
            f"--teacher: '{override}' has a vocabulary of {teacher.config.vocab_size}, the student one of "
            f"{vocabulary}; distillation needs the same tokenizer"
        )
    return teacher


def _load_softmax_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base model so that documents packed in one row do not attend to one another.

    Some families ignore positions when they build their masks, so these documents would. Such a model is loaded with a
    plan that keeps every layer as it is and replaces the masks alone.
    """
    config = source.read_config()
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.masks_ignore_positions:
        return load_base(source, dtype=dtype)
    all_heads = tuple(range(family.heads(config)["num_key_value_heads"]))
    # native: the layer's attention stays the family's own
    layer = LayerPlan(softmax_heads=all_heads, native=True)
    plan = Plan(family.model_type, (layer,) * config["num_hidden_layers"])
    return load_unconverted(source, plan, dtype=dtype)
