"""What a base checkpoint has to be: a config.json of a model that can be converted, and the tensors that this asks for."""

import math
import re
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.weights import BITS, DTYPE_NAMES, FLOATING, TensorInfo, Weights
from linearize.errors import CheckpointError, CoverageError, UnsupportedModelError, nearest, one_line
from linearize.families.refused import reason_to_refuse
from linearize.families.registry import FAMILIES, find_family

if TYPE_CHECKING:
    from linearize.checkpoint.source import Source


def base_config(source: "Source") -> dict[str, Any]:
    """The base's config.json, if it is of a model that can be converted. Needs no torch.

    Raises:
        UnsupportedModelError: it is not. CheckpointError: no config.json, or a damaged one.
    """
    raw = source.read_config()
    model_type = raw.get("model_type")
    if "linearize" in raw or str(model_type).startswith("linearized_"):
        raise UnsupportedModelError(f"{source.name}: is already linearized; convert its base model instead")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{source.name}: is quantised ({method}); convert the original floating-point checkpoint (or a GGUF file, "
            "which is dequantised) and quantise the result"
        )
    if why := reason_to_refuse(raw):
        raise UnsupportedModelError(f"{source.name}: {model_type} cannot be converted: {why}")
    try:
        find_family(str(model_type))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{source.name}: {error}; supported are {', '.join(FAMILIES)}{nearest(str(model_type), FAMILIES)}"
        ) from None
    return raw


def full_config(source: "Source", raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the family's defaults filled in."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**raw).to_dict()
        config |= find_family(raw["model_type"]).heads(config)
        find_family(raw["model_type"]).sliding_windows(config)
    except Exception as error:  # strict configs raise their own types for impossible values
        raise CheckpointError(f"{source.folder / 'config.json'}: {one_line(error)}") from None
    _check_heads(source, config)
    return config


def _check_heads(source: "Source", config: dict[str, Any]) -> None:
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    where = source.folder / "config.json"
    if not isinstance(heads, int) or not isinstance(key_value_heads, int) or heads < 1 or key_value_heads < 1:
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} and num_key_value_heads {key_value_heads}, allowed "
            "are whole numbers above 0"
        )
    if heads % key_value_heads:
        raise CheckpointError(
            f"{where}: {heads} query heads (num_attention_heads) do not divide over {key_value_heads} key/value heads "
            "(num_key_value_heads)"
        )
    if not config.get("head_dim") or config["head_dim"] % 2:
        raise CheckpointError(f"{where}: head_dim {config.get('head_dim')}, allowed is an even number above 0")


def check_tensors(source: "Source", config: dict, family_name: str, weights: Weights) -> tuple[str, ...]:
    """Holds the checkpoint's names, shapes and dtypes against the family's own model; returns the ignorable names."""
    family = find_family(family_name)
    expected, optional = expected_tensors(config, family_name)
    found = weights.tensors
    missing = [name for name in expected if name not in found and name not in optional]
    if missing:
        raise CoverageError(f"{source.name}: {len(missing)} tensors are missing, first '{missing[0]}'")
    ignored = tuple(n for n in found if n not in expected and any(re.search(p, n) for p in family.ignorable_tensors))
    unexpected = [name for name in found if name not in expected and name not in ignored]
    if unexpected:
        raise CoverageError(
            f"{source.name}: {len(unexpected)} unexpected tensors, first '{unexpected[0]}'"
            f"{nearest(unexpected[0], expected)}"
        )
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise CoverageError(
                f"{source.name}: tensor '{name}' in {found[name].file} has shape {list(found[name].shape)}, config.json "
                f"asks for {list(shape)}"
            )
        if name in found and found[name].dtype not in FLOATING:
            raise UnsupportedModelError(
                f"{source.name}: tensor '{name}' is {found[name].dtype}; convert the original floating-point checkpoint"
            )
    return ignored


def weights_of_config(source: "Source", config: dict[str, Any]) -> Weights:
    """The tensors that a checkpoint with this config.json would hold."""
    shapes, tied = expected_tensors(config, config["model_type"])
    named = str(config.get("dtype") or "bfloat16")
    codes = {name: code for code, name in DTYPE_NAMES.items()}
    if (dtype := codes.get(named)) is None:
        raise CheckpointError(f"{source.folder / 'config.json'}: dtype {named}, allowed are {', '.join(codes)}")
    tensors = {
        name: TensorInfo("", 0, dtype, shape, math.prod(shape) * BITS[dtype] // 8)
        for name, shape in shapes.items()
        if name not in tied
    }
    return Weights(source.folder, tensors, ())


def expected_tensors(config: dict, family_name: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes of the base model's tensors, and those a checkpoint may leave out because they are tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception as error:  # of every kind: the values are anybody's
        raise CheckpointError(
            f"config.json: transformers cannot build {family_name} from it: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from None
    weights = model.state_dict()
    tied = model.all_tied_weights_keys if config.get("tie_word_embeddings") else {}
    # checkpoints have names of their own: those of mixtures hold every expert apart, GPT-NeoX's head is embed_out
    on_disk, tied_on_disk = (
        revert_weight_conversion(model, part) for part in (weights, {name: weights[name] for name in tied})
    )
    return {name: tuple(value.shape) for name, value in on_disk.items()}, set(tied_on_disk)
