"""Check that a base checkpoint can be converted: its config.json, and the tensors that its architecture asks for."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linearize.checkpoint.names import LAYER_NUMBER
from linearize.checkpoint.source import Source
from linearize.checkpoint.weights import BITS, DTYPE_NAMES, FLOATING, TensorInfo, Weights
from linearize.errors import CheckpointError, CoverageError, UnsupportedModelError, nearest, one_line
from linearize.families.refused import reason_to_refuse
from linearize.families.registry import FAMILIES, find_family

# bytes of two tensors that are compared at a time
BLOCK_BYTES = 1 << 24


def base_config(source: Source) -> dict[str, Any]:
    """Return the base's config.json, as read, if its model can be converted. Needs no torch.

    Raises:
        UnsupportedModelError: the model cannot be converted.
        CheckpointError: config.json is missing or damaged.
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


def full_config(source: Source, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config with every default of its family filled in.

    Args:
        raw: config.json, as `base_config` returns it.

    Raises:
        CheckpointError: values that transformers refuses, or numbers of heads that cannot be.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**raw).to_dict()
        config |= find_family(raw["model_type"]).heads(config)
        find_family(raw["model_type"]).sliding_windows(config)
    except Exception as error:  # strict configs raise their own types for impossible values
        raise CheckpointError(f"{source.folder / 'config.json'}: {one_line(error)}") from None
    _check_heads(source, config)
    return config


def _check_heads(source: Source, config: dict[str, Any]) -> None:
    """Check the numbers of query and key/value heads, and the head dimension."""
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


def check_tensors(source: Source, config: dict[str, Any], family_name: str, weights: Weights) -> tuple[str, ...]:
    """Compare the checkpoint's tensor names, shapes and dtypes with those of the family's own model.

    Returns:
        Names of the tensors that the family allows to ignore.

    Raises:
        CoverageError: a tensor is missing, unexpected, or of another shape.
        UnsupportedModelError: a tensor is not floating-point.
    """
    family = find_family(family_name)
    expected, optional = expected_tensors(config, family_name)
    tensors = weights.tensors
    missing = [name for name in expected if name not in tensors and name not in optional]
    if missing:
        raise CoverageError(f"{source.name}: {len(missing)} tensors are missing, first '{missing[0]}'")
    unlisted = [name for name in tensors if name not in expected]
    ignored = tuple(
        name
        for name in unlisted
        if source.ignore_unexpected
        or any(re.search(pattern, name) for pattern in family.ignorable_tensors)
        or _predicts_next_tokens(name, config)
    )
    unexpected = [name for name in unlisted if name not in ignored]
    if unexpected:
        raise CoverageError(
            f"{source.name}: {len(unexpected)} unexpected tensors, first '{unexpected[0]}'"
            f"{_near(unexpected[0], expected, config['num_hidden_layers'])}; --ignore-unexpected keeps them, unused"
        )
    for name, shape in expected.items():
        if (info := tensors.get(name)) is None:
            continue
        if info.shape != shape:
            raise CoverageError(
                f"{source.name}: tensor '{name}' in {info.file} has shape {list(info.shape)}, config.json asks for "
                f"{list(shape)}"
            )
        if info.dtype not in FLOATING:
            raise UnsupportedModelError(
                f"{source.name}: tensor '{name}' is {info.dtype}; convert the original floating-point checkpoint"
            )
    return ignored


def _predicts_next_tokens(name: str, config: dict[str, Any]) -> bool:
    """Return True for a tensor of a layer that predicts tokens after the next, which transformers leaves aside.

    Such layers stand behind those that the config counts, or under names of their own (mtp).
    """
    extra = config.get("num_nextn_predict_layers") or config.get("mtp_num_hidden_layers") or 0
    match = LAYER_NUMBER.search(name)
    first = config["num_hidden_layers"]
    behind = match is not None and isinstance(extra, int) and first <= int(match[1]) < first + extra
    return behind or name.startswith(("mtp.", "model.mtp."))


def _near(name: str, expected: Iterable[str], layers: int) -> str:
    """Suggest an expected name that looks like `name`, unless that is of a layer that the config does not count."""
    match = LAYER_NUMBER.search(name)
    if match is not None and int(match[1]) >= layers:
        return f" of a layer beyond the {layers} of config.json"
    return nearest(name, expected)


def untied_head(source: Source, config: dict[str, Any], weights: Weights) -> str | None:
    """Return the name of the output embeddings, if the config ties them and the checkpoint has others; else None."""
    if not config.get("tie_word_embeddings"):
        return None
    _, tied = expected_tensors(config, config["model_type"])
    for target, origin in tied.items():
        one, other = weights.tensors.get(target), weights.tensors.get(origin)
        if one is not None and other is not None and not _same_bytes(weights.folder, one, other):
            return target
    return None


def _same_bytes(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Compare two tensors byte by byte, block by block."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(folder / one.file, "rb") as first, open(folder / other.file, "rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, BLOCK_BYTES):
            length = min(BLOCK_BYTES, one.nbytes - start)
            if first.read(length) != second.read(length):
                return False
    return True


def weights_of_config(source: Source, config: dict[str, Any]) -> Weights:
    """Return the tensors that a checkpoint with this config would hold, for a plan made without weights.

    Raises:
        CheckpointError: config.json names a dtype that is not floating-point.
    """
    shapes, tied = expected_tensors(config, config["model_type"])
    dtype_name = str(config.get("dtype") or "bfloat16")
    codes = {name: code for code, name in DTYPE_NAMES.items()}
    if (dtype := codes.get(dtype_name)) is None:
        raise CheckpointError(f"{source.folder / 'config.json'}: dtype {dtype_name}, allowed are {', '.join(codes)}")
    tensors = {
        name: TensorInfo("", 0, dtype, shape, math.prod(shape) * BITS[dtype] // 8)
        for name, shape in shapes.items()
        if name not in tied
    }
    return Weights(source.folder, tensors, ())


def expected_tensors(config: dict[str, Any], family_name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Build the base model without weights and list its tensors, under the names that checkpoints use.

    Returns:
        Shapes by name, and the names that a checkpoint may leave out, each with the name that it is tied to.

    Raises:
        CheckpointError: transformers cannot build a model from this config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    except Exception as error:  # of any type: the values come from the user's file
        raise CheckpointError(
            f"config.json: transformers cannot build {family_name} from it: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from None
    weights = model.state_dict()
    tied = model.all_tied_weights_keys if config.get("tie_word_embeddings") else {}
    # names on disk differ: mixtures store every expert by itself, GPT-NeoX's head is embed_out
    on_disk = revert_weight_conversion(model, weights)

    def name_on_disk(name: str) -> str:
        return next(iter(revert_weight_conversion(model, {name: weights[name]})))

    tied_on_disk = {name_on_disk(target): name_on_disk(origin) for target, origin in tied.items()}
    return {name: tuple(value.shape) for name, value in on_disk.items()}, tied_on_disk
