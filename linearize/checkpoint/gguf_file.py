"""GGUF files: read by transformers, completed from the file's own metadata, refused where anything in them would get lost.

transformers fills the weights in, but leaves rotary scaling, partial rotary, rotary bases and some sizes of several
architectures at the defaults of their classes, starts tensors that it does not find at random, and drops those that it has
no name for. What the file says of them is in its metadata and its `rope_*` tensors (ggml-org/ggml, docs/gguf.md).
"""

from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, UnsupportedModelError, one_line

# layers of the Gemma 2 and 3 models whose query scale comes from the hidden size; files do not name it (llama.cpp, src/models)
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
INSTEAD = "convert the original checkpoint"


def dequantise(path: Path, folder: Path, dtype: str) -> None:
    """Writes a GGUF file's model and tokenizer as a Hugging Face folder, weights dequantised to `dtype`.

    Raises:
        CheckpointError: damaged, or with content that transformers does not read.
        UnsupportedModelError: an architecture that cannot be converted.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from linearize.families.refused import reason_to_refuse
    from linearize.families.registry import FAMILIES

    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file, or damaged")
    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    # the first versions that are supported always dequantise, and know no setting for it
    if quantization := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = quantization(dequantize=True)
    try:
        fields, rotary, held = _read(path)
        config = AutoConfig.from_pretrained(**location)
        if config.model_type in FAMILIES:
            complete(config, fields, rotary)
        model, info = AutoModelForCausalLM.from_pretrained(**location, config=config, **options)
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except Exception as error:  # the readers raise whatever their parsers do
        raise CheckpointError(f"{path}: cannot be read as GGUF: {one_line(error)}") from None
    if why := reason_to_refuse(model.config.to_dict()):
        raise UnsupportedModelError(
            f"{path}: holds a {model.config.model_type} model, which cannot be converted: {why}"
        )
    _require_whole(path, model, held, sorted(info["missing_keys"]))
    # transformers refuses to save what is still marked as quantised
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # experts under the names that checkpoints give them, which the first versions that are supported forget
    model._weight_conversions = None
    model.config._name_or_path = path.stem
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)


def complete(config, fields: dict[str, Any], rotary: dict[str, Any]) -> None:
    """Sets in `config` what the file says and transformers leaves at its default.

    Args:
        fields: metadata, without the architecture's prefix.
        rotary: the `rope_*` tensors.
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
    if "full_attention" in rope:  # by kind of layer; the scaling is that of full attention
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
    """`rope_parameters` of a file."""
    rope: dict[str, Any] = {}
    if base := fields.get("rope.freq_base"):
        rope["rope_theta"] = base
    if (size := fields.get("rope.dimension_count", head_dim)) != head_dim:
        rope["partial_rotary_factor"] = size / head_dim
    trained = fields.get("rope.scaling.original_context_length") or fields["context_length"]
    # every frequency's own divisor, as Llama 3.1 and LongRoPE have it, holds for any rule that made them
    factors = {kind: rotary.get(f"rope_factors_{kind}.weight") for kind in ("short", "long")}
    if (same := rotary.get("rope_freqs.weight")) is not None:
        factors = {"short": same, "long": same}
        rope["attention_factor"] = 1.0
    if factors["long"] is not None:
        rope |= {f"{kind}_factor": [float(x) for x in values] for kind, values in factors.items()}
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
    """Metadata without the architecture's prefix, the `rope_*` tensors, and how many numbers the others hold."""
    import gguf

    reader = gguf.GGUFReader(path)
    prefix = f"{reader.fields['general.architecture'].contents()}."
    fields = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY  # vocabularies are long, and not asked for here
    }
    rotary = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_")}
    return fields, rotary, sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in rotary)


def _require_whole(path: Path, model, held: int, missing: list[str]) -> None:
    """Every parameter comes from the file, and every number of the file has become part of one."""
    kind = f"a {model.config.model_type} model"
    if missing:
        raise CheckpointError(
            f"{path}: transformers finds {len(missing)} tensors of {kind} not in it, first {missing[0]}; {INSTEAD}"
        )
    read = sum(parameter.numel() for parameter in model.parameters())
    if held != read:
        raise CheckpointError(
            f"{path}: holds {held:,} numbers, of which transformers reads {read:,} into {kind}; {INSTEAD}"
        )
