"""Build what a plan adds to a model, without the model: the linear heads of its layers, their parameters by name."""

from typing import Any

import torch
from torch import Tensor

from linearize.checkpoint.names import ADDED
from linearize.families.registry import find_family
from linearize.mixers.mixer import Site
from linearize.modeling.linear_heads import build_linear_heads
from linearize.modeling.window_heads import WindowHeads
from linearize.plan import Plan


def added_shapes(config: dict[str, Any], plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that the conversion adds to the checkpoint, by name."""
    return {name: tuple(tensor.shape) for name, tensor in added_tensors(config, plan, device="meta").items()}


def added_tensors(config: dict[str, Any], plan: Plan, device: str) -> dict[str, Tensor]:
    """Return every parameter that the conversion adds to the checkpoint, at its first value, by name."""
    family = find_family(plan.base_model_type)
    tensors: dict[str, Tensor] = {}
    for i, heads in linear_heads_by_layer(config, plan, device).items():
        attention = f"{family.decoder_attribute}.layers.{i}.{family.attention_attribute}"
        tensors |= {f"{attention}{ADDED}{name}": value for name, value in heads.state_dict().items()}
    return tensors


def linear_heads_by_layer(config: dict[str, Any], plan: Plan, device: str) -> dict[int, WindowHeads]:
    """Build the linear heads of every layer that has some, with their parameters at their first values."""
    key_value_heads, layers = config["num_key_value_heads"], len(plan.layers)
    heads_by_layer = {}
    with torch.device(device):
        for i, layer in enumerate(plan.layers):
            if linear := layer.linear_heads(key_value_heads):
                site = Site.of(config, linear, i, layers)
                heads_by_layer[i] = build_linear_heads(layer, site, config["hidden_size"])
    return heads_by_layer
