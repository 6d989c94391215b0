"""The student while it trains: LoRA on the projections, the added parameters in full, and the teacher inside it."""

import contextlib
from collections.abc import Iterator

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
from linearize.training.adalora import adalora_config, add_orthogonality, allot, allotment, restore_allotment
from linearize.training.losses import chunked_cross_entropy, chunked_kl


def add_adapters(model: PreTrainedModel, lora: Lora, *, steps: int = 1) -> PeftModel:
    """Freezes the base weights, adds LoRA to the named projections and makes the mixer parameters trainable.

    Args:
        steps: of the whole run, over which AdaLoRA shares out its ranks.

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
    adds_parameters = any(True for name, _ in model.named_parameters() if ADDED in name)
    adapted = get_peft_model(
        model,
        _adapter_config(
            lora,
            steps,
            # a full match, so that nothing inside the mixers can be hit
            target_modules=rf".*\.{family.attention_attribute}\.({'|'.join(targets)})",
            modules_to_save=["mixer"] if adds_parameters else None,
            task_type="CAUSAL_LM",
        ),
    )
    expected = len(targets) * model.config.num_hidden_layers
    mark = ".vera_lambda_d" if lora.variant == "vera" else ".lora_A"
    hit = sum(1 for name, _ in adapted.named_modules() if name.endswith(mark))
    if hit != expected:
        raise ConfigError(f"lora.targets: adapters on {hit} projections, expected {expected}")
    return adapted


def _adapter_config(lora: Lora, steps: int, **common) -> LoraConfig | VeraConfig:
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


def optimizers_of(model: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers of one stage, over what has gradients."""
    groups = parameter_groups(model, settings)
    if settings.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError("optimizer.name: adamw8bit needs bitsandbytes (pip install bitsandbytes)") from None
        return [AdamW8bit(groups, betas=settings.betas)]
    if settings.name == "adamw":
        return [torch.optim.AdamW(groups, betas=settings.betas)]
    found = []
    for make, wanted in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
        parts = [{**group, "params": [p for p in group["params"] if (p.dim() == 2) == wanted]} for group in groups]
        parts = [part for part in parts if part["params"]]
        if parts:
            found.append(make(parts) if wanted else make(parts, betas=settings.betas))
    return found


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict]:
    """LoRA and mixer parameters as groups with a rate of their own; all must be float32."""
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    low = [name for name, value in trainable.items() if value.dtype != torch.float32]
    assert not low, f"trainable parameters must be float32 masters, {low[0]} is not"
    mixer = [value for name, value in trainable.items() if ADDED in name]
    adapters = [value for name, value in trainable.items() if ADDED not in name]
    groups = [
        {"params": adapters, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": mixer, "lr": settings.mixer_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Distiller(nn.Module):
    """One forward is one loss, so that data parallelism can wrap it whole.

    The teacher is the student's own instance in softmax mode with its adapters off, or a model of its own.
    """

    def __init__(self, student: PeftModel, teacher: PreTrainedModel | None = None, before_adapters: int = 0):
        """`before_adapters`: how many steps come before those that train adapters."""
        super().__init__()
        self.before_adapters = before_adapters
        self.student, self.loss = student, Loss()
        self.trainable = [name for name, value in self.named_parameters() if value.requires_grad]
        # not a submodule: it neither trains nor is saved
        object.__setattr__(self, "teacher", teacher)

    def start(self, stage: Stage) -> None:
        """Gets ready for a stage: its loss, and what trains in it. Attention transfer trains the added parameters alone."""
        self.loss = stage.loss
        parameters = dict(self.named_parameters())
        for name in self.trainable:
            parameters[name].requires_grad_(stage.loss.kind != "attention" or ADDED in name)
        if not any(value.requires_grad for value in parameters.values()):
            raise ConfigError(f"stages: {stage.name} has nothing to train, since the conversion added no parameters")

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
        loss = chunked_kl(hidden, reference, head, teacher_head, weights, self.loss.chunk_tokens)
        if self.loss.ce_share:
            targets = weights * (labels != IGNORED)
            likelihood = chunked_cross_entropy(hidden, head, labels, targets, self.loss.chunk_tokens)
            loss = (1 - self.loss.ce_share) * loss + self.loss.ce_share * likelihood
        return loss

    @property
    def allots_ranks(self) -> bool:
        """Whether this stage trains AdaLoRA's adapters."""
        return self.student.active_peft_config.peft_type == "ADALORA" and self.loss.kind != "attention"

    def before_update(self) -> None:
        """Once the gradients of a step are whole."""
        if self.allots_ranks:
            add_orthogonality(self.student)

    def after_update(self, step: int) -> None:
        """While they are still there."""
        if self.allots_ranks:
            allot(self.student, step - self.before_adapters)

    def memory(self) -> dict[str, Tensor]:
        """What has to be saved beside parameters and optimizers, and `restore` takes back."""
        return allotment(self.student) if self.allots_ranks else {}

    def restore(self, memory: dict[str, Tensor]) -> None:
        if self.allots_ranks:
            restore_allotment(self.student, memory)

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
