"""Attention transfer: every layer's linear heads matched to the softmax they replace, on the base's own hidden states.

One pass of the base model serves all layers; each layer's loss goes backward at once, so the memory is that of one layer.
Only the added parameters train. Source: LoLCATs, arXiv 2410.10254, section 3.2.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.data.packing import Batch
from linearize.modeling.attention import Observation

EPSILON = 1e-6


def transfer_backward(model: PreTrainedModel, batch: Batch, share: float) -> Tensor:
    """Adds the gradients of `share` times the loss on one batch and returns that loss.

    The loss is the mean over rows and layers of |linear - softmax|^2 / |softmax|^2, attention outputs before the output
    projection.
    """
    losses: list[Tensor] = []

    def match(seen: Observation) -> None:
        with torch.enable_grad():
            target = seen.target.detach().float()
            errors, sizes = (x.square().flatten(1).sum(1) for x in (seen.run().float() - target, target))
            error = (errors / sizes.clamp(min=EPSILON)).mean()
            loss = share * error / layers
            if loss.requires_grad:  # a window alone has nothing to train
                loss.backward()
        losses.append(loss.detach())

    layers = sum(1 for _, attention in model.linear_attentions() if attention.linear_heads)
    with torch.no_grad(), model.observed(match):
        model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return torch.stack(losses).sum()
