"""AdaLoRA (arXiv 2303.10512): adapters B diag(E) A, under one budget of ranks that go where the loss is most sensitive.

PEFT allots the ranks; here it is told the steps, A and B are drawn towards orthogonality (equation 4), and what the
allotment remembers is handed out, so that a stopped run goes on to the same weights.
"""

import math

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor

from linearize.settings.recipe import Lora

# of a run: steps at the full first rank, and at the end with the ranks that were found; the first rank over the last
WARM, SETTLED, FIRST = 0.1, 0.4, 1.5
ORTHOGONALITY = 0.1


def adalora_config(lora: Lora, steps: int, **common) -> AdaLoraConfig:
    """`lora.rank` is the average rank at the end of `steps`."""
    return AdaLoraConfig(
        init_r=math.ceil(FIRST * lora.rank),
        target_r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        tinit=int(WARM * steps),
        tfinal=int(SETTLED * steps),
        total_step=steps,
        orth_reg_weight=ORTHOGONALITY,
        **common,
    )


@torch.no_grad()
def add_orthogonality(model: PeftModel) -> None:
    """Adds the gradients of ORTHOGONALITY times the mean of |A Aᵀ - I| and |Bᵀ B - I| over all adapters."""
    factors = [(name, p) for name, p in model.named_parameters() if p.requires_grad and _is_factor(name)]
    for name, factor in factors:
        rows = factor if ".lora_A." in name else factor.T  # [rank, width]
        surplus = rows @ rows.T - torch.eye(rows.shape[0], device=rows.device)
        gradient = 2 * ORTHOGONALITY / len(factors) * surplus @ rows / surplus.norm().clamp(min=1e-12)
        factor.grad += gradient if ".lora_A." in name else gradient.T


def allot(model: PeftModel, step: int) -> None:
    """Rates every rank by this step's gradients, which must still be there, and masks what the budget leaves out."""
    model.base_model.update_and_allocate(step)


def allotment(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT's allotment remembers from step to step, as tensors."""
    allocator = model.base_model.rankallocator
    tensors = {f"{kind}/{name}": value for kind in _MEMORIES for name, value in getattr(allocator, kind).items()}
    ranks = model.active_peft_config.rank_pattern or {}
    return tensors | {f"ranks/{name}": torch.tensor(kept) for name, kept in ranks.items()}


def restore_allotment(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Undoes `allotment`."""
    allocator = model.base_model.rankallocator
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "ranks":
            config = model.active_peft_config
            config.rank_pattern = {**(config.rank_pattern or {}), name: value.tolist()}
        else:
            getattr(allocator, kind)[name] = value


_MEMORIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
