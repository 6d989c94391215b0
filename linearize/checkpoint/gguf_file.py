"""Dequantise GGUF files: transformers reads them, this module completes them and refuses what would get lost.

transformers fills in the weights, but leaves some settings of several architectures at the defaults of their classes:
rotary scaling, partial rotary, rotary bases and some sizes. It starts tensors that it does not find at random, and
drops tensors that it has no name for. The right settings are in the file's metadata and its `rope_*` tensors
(ggml-org/ggml, docs/gguf.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import CheckpointError, UnsupportedModelError, one_line
from linearize.families.refused import reason_to_refuse
from linearize.families.registry import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# layers of the Gemma 2 and 3 models whose query scale comes from the hidden size; GGUF does not store the scale, so
# llama.cpp knows these models by their layers, too (src/models)
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
# advice at the end of error messages
INSTEAD = "convert the original checkpoint"


def dequantise(path: Path, folder: Path, dtype: str) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder.

    Args:
        dtype: name of the dtype that the weights are dequantised to.

    Raises:
        CheckpointError: the file is damaged, or has content that transformers does not read.
        UnsupportedModelError: its architecture cannot be converted.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file, or damaged")
    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    # the oldest supported versions of transformers always dequantise, and have no GgufConfig
    if quantization := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = quantization(dequantize=True)
    try:
        fields, rotary, stored_numbers = _read(path)
        config = AutoConfig.from_pretrained(**location)
        if config.model_type in FAMILIES:
            complete(config, fields, rotary)
        model, info = AutoModelForCausalLM.from_pretrained(**location, config=config, **options)
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except Exception as error:  # the readers raise what their parsers raise, of any type
        raise CheckpointError(f"{path}: cannot be read as GGUF: {one_line(error)}") from None
    if why := reason_to_refuse(model.config.to_dict()):
        raise UnsupportedModelError(
            f"{path}: holds a {model.config.model_type} model, which cannot be converted: {why}"
        )
    _require_complete(path, model, stored_numbers, sorted(info["missing_keys"]))
    # transformers refuses to save a model that is still marked as quantised
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # without this, the oldest supported versions of transformers save experts under other names than checkpoints use
    model._weight_conversions = None
    model.config._name_or_path = path.stem
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)


def complete(config: "PretrainedConfig", fields: dict[str, Any], rotary: dict[str, Any]) -> None:
    """Set those settings of `config` that the file states and transformers leaves at their defaults.

    Args:
        fields: the file's metadata, keys without the architecture's prefix.
        rotary: the file's `rope_*` tensors by name.
    """
    known = config.to_dict()
    settings = {
        "head_dim": fields.get("attention.key_length"),
        "moe_intermediate_size": fields.get("expert_feed_forward_length"),
        "sliding_window": fields.get("attention.sliding_window") or None,
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
    }
    for name, value in settings.items():
        if value is not None and name in known:
            setattr(config, name, value)
    config.pad_token_id = fields.get("tokenizer.ggml.padding_token_id")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "query_pre_attn_scalar" in known:
        whole = config.num_hidden_layers == GEMMA_27B.get(config.model_type)
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if whole else head_dim
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:  # settings by kind of layer; a file's scaling is that of full attention
        rope["full_attention"] = {**rope["full_attention"], **_rotary(fields, rotary, head_dim)}
        if base := fields.get("rope.freq_base_swa"):
            rope["sliding_attention"] = {**rope["sliding_attention"], "rope_theta": base}
    else:
        rope |= _rotary(fields, rotary, head_dim)
    config.rope_parameters = rope
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name in known and name in rope:
            setattr(config, name, rope[name])


def _rotary(fields: dict[str, Any], rotary: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Return the `rope_parameters` that a file states."""
    rope: dict[str, Any] = {}
    if base := fields.get("rope.freq_base"):
        rope["rope_theta"] = base
    if (size := fields.get("rope.dimension_count", head_dim)) != head_dim:
        rope["partial_rotary_factor"] = size / head_dim
    trained = fields.get("rope.scaling.original_context_length") or fields["context_length"]
    # one divisor for each frequency (Llama 3.1, LongRoPE) expresses whatever rule the divisors were made by
    short, long = (rotary.get(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
    if (same := rotary.get("rope_freqs.weight")) is not None:
        short = long = same
        rope["attention_factor"] = 1.0
    if long is not None:
        if short is None:
            raise ValueError(f"rotary factors of long contexts without those of short ones; {INSTEAD}")
        rope["short_factor"], rope["long_factor"] = ([float(x) for x in divisors] for divisors in (short, long))
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": trained}
        if (scale := fields.get("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = scale
        return rope
    kind = fields.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": fields["rope.scaling.factor"]}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = trained
            for name in ("beta_fast", "beta_slow"):
                if (value := fields.get(f"rope.scaling.yarn_{name}")) is not None:
                    rope[name] = value
    elif kind not in ("none", ""):
        raise ValueError(f"rotary scaling '{kind}' is not one of linear, yarn, longrope; {INSTEAD}")
    return rope


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return metadata without the architecture's prefix, the `rope_*` tensors, and the count of all other numbers."""
    import gguf

    reader = gguf.GGUFReader(path)
    prefix = f"{reader.fields['general.architecture'].contents()}."
    fields = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY  # arrays are vocabularies, which are long and not needed
    }
    rotary = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_")}
    return fields, rotary, sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in rotary)


def _require_complete(path: Path, model: "PreTrainedModel", stored_numbers: int, missing: list[str]) -> None:
    """Check that every parameter comes from the file, and that every number of the file is in a parameter.

    Args:
        stored_numbers: count of the numbers in the file's tensors.
        missing: names of parameters that transformers did not find in the file.

    Raises:
        CheckpointError: one of the two does not hold.
    """
    kind = f"a {model.config.model_type} model"
    if missing:
        raise CheckpointError(
            f"{path}: transformers finds {len(missing)} tensors of {kind} not in it, first {missing[0]}; {INSTEAD}"
        )
    read = sum(parameter.numel() for parameter in model.parameters())
    if stored_numbers != read:
        raise CheckpointError(
            f"{path}: holds {stored_numbers:,} numbers, of which transformers reads {read:,} into {kind}; {INSTEAD}"
        )
