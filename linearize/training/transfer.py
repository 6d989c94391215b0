"""Attention transfer: match every layer's linear heads to the softmax they replace, on the base's own hidden states.

One pass of the base model serves all layers. Each layer's loss goes backward at once, so the memory is that of one
layer. Only the added parameters train. Source: LoLCATs, arXiv 2410.10254, section 3.2.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.data.packing import Batch
from linearize.modeling.attention_call import Observation

# least square size of an attention output that an error is relative to
EPSILON = 1e-6


def transfer_backward(model: PreTrainedModel, batch: Batch, share: float) -> Tensor:
    """Add the gradients of `share` times the loss on one batch, and return that loss.

    The loss is the sum over layers of the mean over rows of |linear - softmax|^2 / |softmax|^2, divided by the number
    of layers. Both are attention outputs before the output projection.

    Args:
        model: the student.
        batch: packed rows.
        share: the share of this batch in the loss of a step.
    """
    losses: list[Tensor] = []
    layers = sum(1 for _, attention in model.linear_attentions() if attention.linear_heads)

    def match(observation: Observation) -> None:
        """Go backward from the loss of one layer."""
        with torch.enable_grad():
            target = observation.target.detach().float()
            output = observation.run().float()
            relative_error = _square_sizes(output - target) / _square_sizes(target).clamp(min=EPSILON)
            loss = share * relative_error.mean() / layers
            if loss.requires_grad:  # a window alone has nothing to train
                loss.backward()
        losses.append(loss.detach())

    with torch.no_grad(), model.observed(match):
        model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return torch.stack(losses).sum()


def _square_sizes(outputs: Tensor) -> Tensor:
    """Sum the squares of each row: [B, ...] -> [B]."""
    return outputs.square().flatten(1).sum(1)
