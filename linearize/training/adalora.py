"""AdaLoRA (arXiv 2303.10512): adapters B diag(E) A, under one budget of ranks that go where the loss is most sensitive.

PEFT allocates the ranks. This module gives it the steps, draws A and B towards orthogonality (equation 4), and hands
out the allocator's memory, so that a stopped run goes on to the same weights.
"""

import math
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor

from linearize.settings.recipe import Lora

# shares of a run's steps: first at the full first rank, and last with settled ranks
WARMUP_SHARE, SETTLED_SHARE = 0.1, 0.4
# the first rank over the average rank at the end, as in the paper
FIRST_RANK = 1.5
ORTHOGONALITY = 0.1
# tensors that PEFT's allocator carries from step to step
_ALLOCATOR_TENSORS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def adalora_config(lora: Lora, steps: int, **common: Any) -> AdaLoraConfig:
    """Return PEFT's configuration, in which `lora.rank` is the average rank at the end of `steps`."""
    return AdaLoraConfig(
        init_r=math.ceil(FIRST_RANK * lora.rank),
        target_r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        tinit=int(WARMUP_SHARE * steps),
        tfinal=int(SETTLED_SHARE * steps),
        total_step=steps,
        orth_reg_weight=ORTHOGONALITY,
        **common,
    )


@torch.no_grad()
def add_orthogonality(model: PeftModel) -> None:
    """Add the gradients of ORTHOGONALITY times the mean of |A Aᵀ - I| and |Bᵀ B - I| over all adapters."""
    factors = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name)
    ]
    for name, factor in factors:
        rows = factor if ".lora_A." in name else factor.T  # [rank, width]
        surplus = rows @ rows.T - torch.eye(rows.shape[0], device=rows.device)
        gradient = 2 * ORTHOGONALITY / len(factors) * surplus @ rows / surplus.norm().clamp(min=1e-12)
        factor.grad += gradient if ".lora_A." in name else gradient.T


def allocate_ranks(model: PeftModel, step: int) -> None:
    """Rate every rank by this step's gradients, which must still be there, and mask those beyond the budget."""
    model.base_model.update_and_allocate(step)


def allocator_memory(model: PeftModel) -> dict[str, Tensor]:
    """Return everything that PEFT's allocator carries from step to step, as tensors."""
    allocator = model.base_model.rankallocator
    memory = {
        f"{kind}/{name}": value for kind in _ALLOCATOR_TENSORS for name, value in getattr(allocator, kind).items()
    }
    masks = model.active_peft_config.rank_pattern or {}
    return memory | {f"ranks/{name}": torch.tensor(mask) for name, mask in masks.items()}


def restore_allocator(model: PeftModel, memory: dict[str, Tensor]) -> None:
    """Put back the memory that `allocator_memory` returned."""
    allocator, config = model.base_model.rankallocator, model.active_peft_config
    for key, value in memory.items():
        kind, _, name = key.partition("/")
        if kind == "ranks":
            config.rank_pattern = {**(config.rank_pattern or {}), name: value.tolist()}
        else:
            getattr(allocator, kind)[name] = value
