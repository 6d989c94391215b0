"""The student while it trains: LoRA on the projections, the added parameters in full, and the teacher inside it."""

import contextlib
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.errors import ConfigError, nearest
from linearize.families.registry import find_family
from linearize.modeling.readout import readout_of
from linearize.recipe import Lora, Loss, Recipe
from linearize.training.data import IGNORED, Batch
from linearize.training.losses import chunked_cross_entropy, chunked_kl

MIXER = ".mixer."


def add_adapters(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Freezes the base weights, adds LoRA to the named projections and makes the mixer parameters trainable.

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
    adds_parameters = any(True for name, _ in model.named_parameters() if MIXER in name)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # a full match, so that nothing inside the mixers can be hit
        target_modules=rf".*\.{family.attention_attribute}\.({'|'.join(targets)})",
        modules_to_save=["mixer"] if adds_parameters else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    expected = len(targets) * model.config.num_hidden_layers
    hit = sum(1 for name, _ in adapted.named_modules() if name.endswith(".lora_A"))
    if hit != expected:
        raise ConfigError(f"lora.targets: adapters on {hit} projections, expected {expected}")
    return adapted


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """LoRA and mixer parameters as two groups with a rate of their own; both must be float32."""
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    low = [name for name, value in trainable.items() if value.dtype != torch.float32]
    assert not low, f"trainable parameters must be float32 masters, {low[0]} is not"
    mixer = [value for name, value in trainable.items() if MIXER in name]
    adapters = [value for name, value in trainable.items() if MIXER not in name]
    groups = [{"params": adapters, "lr": recipe.optimizer.lr, "weight_decay": recipe.optimizer.weight_decay}]
    if mixer:
        groups.append({"params": mixer, "lr": recipe.optimizer.mixer_lr, "weight_decay": 0.0})
    return groups


class Distiller(nn.Module):
    """One forward is one loss, so that data parallelism can wrap it whole.

    The teacher is the student's own instance in softmax mode with its adapters off, or a model of its own.
    """

    def __init__(self, student: PeftModel, loss: Loss, teacher: PreTrainedModel | None = None):
        super().__init__()
        self.student, self.loss = student, loss
        # not a submodule: it neither trains nor is saved
        object.__setattr__(self, "teacher", teacher)

    def forward(self, batch: Batch, normaliser: Tensor) -> Tensor:
        """Sum of the losses of this batch's counted positions, divided by `normaliser`."""
        model = self.student.get_base_model()
        labels = batch.labels.flatten()
        if self.loss.kind == "kl" and not self.loss.completion_only:
            # every position that has a successor in its document, whether or not the row goes on
            weights = torch.ones_like(labels, dtype=torch.float32)
        else:
            weights = (labels != IGNORED).float()
        weights = weights / normaliser
        hidden = _hidden_states(model, batch)
        head = readout_of(model)
        if self.loss.kind == "ce":
            return chunked_cross_entropy(hidden, head, labels, weights, self.loss.chunk_tokens)
        with torch.no_grad(), self._teaching() as teacher:
            reference = _hidden_states(teacher, batch)
            teacher_head = readout_of(teacher)
        return chunked_kl(hidden, reference, head, teacher_head, weights, self.loss.chunk_tokens)

    def counted(self, batch: Batch) -> int:
        """How many positions of `batch` the loss counts."""
        if self.loss.kind == "kl" and not self.loss.completion_only:
            return batch.labels.numel()
        return int((batch.labels != IGNORED).sum())

    @contextlib.contextmanager
    def _teaching(self) -> Iterator[PreTrainedModel]:
        if self.teacher is not None:
            yield self.teacher
            return
        model = self.student.get_base_model()
        training = model.training
        model.eval()
        with self.student.disable_adapter(), model.softmax_attention():
            yield model
        model.train(training)


def _hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[N, D] hidden states after the final norm. Documents are told apart by their restarting positions."""
    output = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)
