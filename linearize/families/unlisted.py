"""Read the facts of an unlisted family from transformers' own classes. Such a family is experimental."""

import functools
import importlib
import inspect

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize.errors import UnsupportedModelError
from linearize.families.family import Family
from linearize.families.refused import NO_INTERFACE

WHY = "not listed; its facts were read off transformers' classes"


@functools.cache
def read_off(model_type: str) -> Family:
    """Build the family's default model without weights, and find its attention.

    Raises:
        UnsupportedModelError: there is no such causal language model, or its attention cannot be replaced.
    """
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{model_type} cannot be converted: this version of transformers has no causal language model of that type"
        )
    config_class, module = CONFIG_MAPPING[model_type], model_type_to_module_name(model_type)
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    causal_lm = getattr(modeling, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    if not causal_lm._supports_attention_backend:
        raise UnsupportedModelError(f"{model_type} cannot be converted: {NO_INTERFACE}")
    with torch.device("meta"):
        model = causal_lm(config_class())
    layers = dict(model.base_model.named_children()).get("layers", [nn.Module()])
    attentions = [
        (name, child)
        for name, child in layers[0].named_children()
        if "position_embeddings" in inspect.signature(child.forward).parameters
    ]
    if len(attentions) != 1:
        raise UnsupportedModelError(
            f"{model_type} cannot be converted: no attention that takes rotary as position_embeddings was found in its "
            "layers"
        )
    name, attention = attentions[0]
    return Family(
        model_type,
        config_class.__name__,
        causal_lm.__name__,
        type(model.base_model).__name__,
        type(attention).__name__,
        module="" if module == model_type else module,
        decoder_attribute=model.base_model_prefix,
        attention_attribute=name,
        lora_targets=tuple(key for key, child in attention.named_children() if isinstance(child, nn.Linear)),
        experimental=WHY,
    )
