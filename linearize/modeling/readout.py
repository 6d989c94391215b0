"""Compute logits from the hidden states after the final norm, for any number of tokens, as each family does it.

    logits = softcap tanh(scale (h Wᵀ + b) / softcap)

Shapes: N tokens, D hidden size, C vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearize.families.registry import find_family
from linearize.plan import PREFIX


@dataclass(frozen=True)
class Readout:
    """The output embeddings [C, D] and bias [C] of one model, with the scale and the softcap of their logits."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, C] of hidden states [N, D], float32."""
        return self.capped(self.uncapped(hidden))

    def uncapped(self, hidden: Tensor) -> Tensor:
        """Return the logits before the softcap."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias).float()
        return logits if self.scale == 1.0 else logits * self.scale

    def capped(self, logits: Tensor) -> Tensor:
        """Apply the softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def readout_of(model: PreTrainedModel) -> Readout:
    """Return the readout of a base or linearized model."""
    family = find_family(model.config.model_type.removeprefix(PREFIX))
    config, head = model.config.to_dict(), model.get_output_embeddings()
    return Readout(head.weight, head.bias, family.logit_scale(config), config.get("final_logit_softcapping"))
