"""What a plan adds to a model: the linear heads of its layers, on their own, and their parameters by checkpoint name."""

from typing import Any

import torch

from linearize.checkpoint.names import ADDED
from linearize.families.registry import find_family
from linearize.mixers.mixer import Site
from linearize.modeling.branch import WindowHeads, build_linear_heads
from linearize.plan import Plan


def added_shapes(config: dict[str, Any], plan: Plan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that the conversion adds to the checkpoint."""
    return {name: tuple(tensor.shape) for name, tensor in added_tensors(config, plan, device="meta").items()}


def added_tensors(config: dict[str, Any], plan: Plan, device: str) -> dict[str, Any]:
    family = find_family(plan.base_model_type)
    return {
        f"{family.decoder_attribute}.layers.{i}.{family.attention_attribute}{ADDED}{name}": value
        for i, branch in linear_branches(config, plan, device).items()
        for name, value in branch.state_dict().items()
    }


def linear_branches(config: dict[str, Any], plan: Plan, device: str) -> dict[int, WindowHeads]:
    """The linear heads of every layer that has some, with their parameters at their first values."""
    heads, layers = config["num_key_value_heads"], len(plan.layers)
    branches = {}
    with torch.device(device):
        for i, layer in enumerate(plan.layers):
            if linear := layer.linear_heads(heads):
                branches[i] = build_linear_heads(layer, Site.of(config, linear, i, layers), config["hidden_size"])
    return branches
