"""The student under training: adapters on its projections, the added parameters in full, and the teacher inside it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.checkpoint.names import ADDED
from linearize.data.packing import IGNORED, Batch
from linearize.errors import ConfigError, nearest
from linearize.families.registry import find_family
from linearize.modeling.readout import readout_of
from linearize.settings.recipe import CHANGES_BASE, Lora, Loss, Optimizer, Stage
from linearize.training.adalora import (
    adalora_config,
    add_orthogonality,
    allocate_ranks,
    allocator_memory,
    restore_allocator,
)
from linearize.training.losses import chunked_cross_entropy, chunked_kl


def add_adapters(model: PreTrainedModel, lora: Lora, *, steps: int = 1) -> PeftModel:
    """Freeze the base weights, add adapters to the projections, and make the added parameters trainable.

    Args:
        model: the student.
        lora: variant, rank and targets.
        steps: steps that train adapters, over which AdaLoRA allocates its ranks.

    Raises:
        ConfigError: a target that names no projection of the family's attention blocks.
    """
    family = find_family(model.config.plan.base_model_type)
    targets = lora.targets or list(family.lora_targets)
    for target in targets:
        if target not in family.lora_targets:
            raise ConfigError(
                f"lora.targets: got '{target}', allowed are {', '.join(family.lora_targets)}"
                f"{nearest(target, family.lora_targets)}"
            )
    has_added_parameters = any(ADDED in name for name, _ in model.named_parameters())
    config = _adapter_config(
        lora,
        steps,
        # matched in full, so that no module inside the mixers can be hit
        target_modules=rf".*\.{family.attention_attribute}\.({'|'.join(targets)})",
        modules_to_save=["mixer"] if has_added_parameters else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    suffix = ".vera_lambda_d" if lora.variant == "vera" else ".lora_A"
    adapters = sum(1 for name, _ in adapted.named_modules() if name.endswith(suffix))
    expected = len(targets) * model.config.num_hidden_layers
    if adapters != expected:
        raise ConfigError(f"lora.targets: adapters on {adapters} projections, expected {expected}")
    return adapted


def _adapter_config(lora: Lora, steps: int, **common: Any) -> LoraConfig | VeraConfig:
    """Return PEFT's configuration of a variant; `common` holds the arguments that all variants have."""
    if lora.variant == "adalora":
        return adalora_config(lora, steps, **common)
    if lora.variant == "vera":
        return VeraConfig(r=lora.rank, vera_dropout=lora.dropout, **common)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.variant == "dora",
        use_rslora=lora.variant == "rslora",
        init_lora_weights=lora.variant if lora.variant in CHANGES_BASE else True,
        **common,
    )


def make_optimizers(model: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Make the optimizers of one stage, over the parameters that train in it.

    Raises:
        ConfigError: the optimizer needs a package that is not installed.
    """
    groups = parameter_groups(model, settings)
    if settings.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError("optimizer.name: adamw8bit needs bitsandbytes (pip install bitsandbytes)") from None
        return [AdamW8bit(groups, betas=settings.betas)]
    if settings.name == "adamw":
        return [torch.optim.AdamW(groups, betas=settings.betas)]
    matrices, others = _split_matrices(groups)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices))
    if others:
        optimizers.append(torch.optim.AdamW(others, betas=settings.betas))
    return optimizers


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """Return the trainable parameters, adapters and added ones, as groups with a rate of their own.

    All must be float32: an update of a bfloat16 weight is often smaller than its last digit.
    """
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    narrow = [name for name, value in trainable.items() if value.dtype != torch.float32]
    assert not narrow, f"trainable parameters must be float32 masters, {narrow[0]} is not"
    added = [value for name, value in trainable.items() if ADDED in name]
    adapters = [value for name, value in trainable.items() if ADDED not in name]
    groups: list[dict[str, Any]] = [
        {"params": adapters, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": added, "lr": settings.mixer_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _split_matrices(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split parameter groups into those of matrices, which Muon is for, and those of the rest."""
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        for part, wants_matrices in ((matrices, True), (others, False)):
            parameters = [value for value in group["params"] if (value.dim() == 2) == wants_matrices]
            if parameters:
                part.append({**group, "params": parameters})
    return matrices, others


class Distiller(nn.Module):
    """The student with its loss; one forward is one loss, so that data parallelism can wrap the whole.

    The teacher is the student's own instance in softmax mode with its adapters off, or a model of its own.
    """

    def __init__(self, student: PeftModel, teacher: PreTrainedModel | None = None, steps_before_adapters: int = 0):
        """Wrap a student.

        Args:
            student: the student with its adapters.
            teacher: a model of its own, or None for the base model inside the student.
            steps_before_adapters: steps of the run before those that train adapters.
        """
        super().__init__()
        self.steps_before_adapters = steps_before_adapters
        self.student, self.loss = student, Loss()
        trainable = {name: value for name, value in self.named_parameters() if value.requires_grad}
        self.trainable_names = list(trainable)
        # their number, over all stages
        self.trainable_parameters = sum(value.numel() for value in trainable.values())
        self.teacher: PreTrainedModel | None
        # not a submodule: it neither trains nor is saved
        object.__setattr__(self, "teacher", teacher)

    def start(self, stage: Stage) -> None:
        """Take the loss of a stage and unfreeze what trains in it. Attention transfer trains added parameters alone.

        Raises:
            ConfigError: the stage has nothing to train.
        """
        self.loss = stage.loss
        parameters = dict(self.named_parameters())
        for name in self.trainable_names:
            parameters[name].requires_grad_(stage.loss.kind != "attention" or ADDED in name)
        if not any(value.requires_grad for value in parameters.values()):
            raise ConfigError(f"stages: {stage.name} has nothing to train, since the conversion added no parameters")

    def forward(self, batch: Batch, normaliser: Tensor) -> Tensor:
        """Return the sum of the losses of this batch's counted positions, divided by `normaliser`."""
        student = self.student.get_base_model()
        labels = batch.labels.flatten()
        counts = torch.ones_like(labels, dtype=torch.bool) if self._counts_all else labels != IGNORED
        weights = counts.float() / normaliser
        hidden, head = _hidden_states(student, batch), readout_of(student)
        if self.loss.kind == "ce":
            return chunked_cross_entropy(hidden, head, labels, weights, self.loss.chunk_tokens)
        with torch.no_grad(), self._teacher_model() as teacher:
            teacher_hidden, teacher_head = _hidden_states(teacher, batch), readout_of(teacher)
        loss = chunked_kl(hidden, teacher_hidden, head, teacher_head, weights, self.loss.chunk_tokens)
        if self.loss.ce_share:
            weights = weights * (labels != IGNORED)
            cross_entropy = chunked_cross_entropy(hidden, head, labels, weights, self.loss.chunk_tokens)
            loss = (1 - self.loss.ce_share) * loss + self.loss.ce_share * cross_entropy
        return loss

    @property
    def _counts_all(self) -> bool:
        """True if the loss counts every position, also the last of a document or row: a teacher answers there too."""
        return self.loss.kind == "kl" and not self.loss.completion_only

    def counted(self, batch: Batch) -> int:
        """Return the number of positions of `batch` that the loss counts."""
        return batch.labels.numel() if self._counts_all else int((batch.labels != IGNORED).sum())

    @contextlib.contextmanager
    def _teacher_model(self) -> Iterator[PreTrainedModel]:
        """Give the teacher; the student's own instance is the base model inside the context."""
        if self.teacher is not None:
            yield self.teacher
            return
        model = self.student.get_base_model()
        training = model.training
        model.eval()
        with self.student.disable_adapter(), model.softmax_attention():
            yield model
        model.train(training)

    @property
    def _allocates_ranks(self) -> bool:
        """True if this stage trains AdaLoRA's adapters."""
        return self.student.active_peft_config.peft_type == "ADALORA" and self.loss.kind != "attention"

    def before_update(self) -> None:
        """Complete the gradients of a step before the optimizers use them."""
        if self._allocates_ranks:
            add_orthogonality(self.student)

    def after_update(self, step: int) -> None:
        """Finish a step after the optimizers, while its gradients are still there."""
        if self._allocates_ranks:
            allocate_ranks(self.student, step - self.steps_before_adapters)

    def rank_memory(self) -> dict[str, Tensor]:
        """Return the tensors that a saved state needs beside parameters and optimizers."""
        return allocator_memory(self.student) if self._allocates_ranks else {}

    def restore_rank_memory(self, memory: dict[str, Tensor]) -> None:
        """Put back the tensors that `rank_memory` returned."""
        if self._allocates_ranks:
            restore_allocator(self.student, memory)


def _hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return hidden states after the final norm, [N, D]. Positions that start again tell the documents apart."""
    output = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)
