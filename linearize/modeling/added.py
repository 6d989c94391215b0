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


def of_fewer_heads(tensors: dict[str, Tensor], config: dict[str, Any], plan: Plan, smaller: Plan) -> dict[str, Tensor]:
    """Pick from the added parameters of `plan` those of the linear heads of `smaller`.

    Args:
        smaller: a plan like `plan` with more softmax heads. Windows may differ.
    """
    J = config["num_key_value_heads"]
    picked = {}
    for name, shape in added_shapes(config, smaller).items():
        layer = int(name.partition(".layers.")[2].partition(".")[0])
        heads, fewer = plan.layers[layer].linear_heads(J), smaller.layers[layer].linear_heads(J)
        places = [heads.index(head) for head in fewer]
        tensor = tensors[name]
        for dimension, size in enumerate(shape):
            if tensor.shape[dimension] != size:  # whatever counts heads has one block for each
                blocks = tensor.unflatten(dimension, (len(heads), -1))
                tensor = blocks.index_select(dimension, torch.tensor(places)).flatten(dimension, dimension + 1)
        picked[name] = tensor.clone()
    return picked
