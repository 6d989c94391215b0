"""Dequantise GGUF files: transformers reads them, this module completes them and refuses what would get lost.

transformers fills in the weights, but leaves some settings of several architectures at the defaults of their classes:
rotary scaling, partial rotary, rotary bases and some sizes. It starts tensors that it does not find at random, and
drops tensors that it has no name for. The right settings are in the file's metadata and its `rope_*` tensors
(ggml-org/ggml, docs/gguf.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.gguf_header import check_gguf_header
from linearize.checkpoint.weights import INDEX, SINGLE
from linearize.checkpoint.writing import write_json, write_tensors
from linearize.errors import (
    CheckpointError,
    ResourceError,
    UnsupportedModelError,
    is_out_of_memory,
    one_line,
    raise_if_full,
)
from linearize.families.refused import reason_to_refuse
from linearize.families.registry import FAMILIES
from linearize.progress import counting, doing

if TYPE_CHECKING:
    import torch
    from gguf.gguf_reader import ReaderTensor
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

# layers of the Gemma 2 and 3 models whose query scale comes from the hidden size; GGUF does not store the scale, so
# llama.cpp knows these models by their layers, too (src/models)
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
# least bytes of a shard
SHARD_BYTES = 256 * 2**20
# tensors that files store as transformers does, and their rows that are dequantised at a time
EMBEDDINGS, ROWS = ("token_embd.weight", "output.weight"), 8192
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
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    check_gguf_header(path)
    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        fields, rotary, stored_numbers = _read(path)
        config = AutoConfig.from_pretrained(**location, trust_remote_code=False)
        if config.model_type in FAMILIES:
            complete(config, fields, rotary)
        tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
    except Exception as error:  # the readers raise what their parsers raise, of any type
        raise _unreadable(path, error) from None
    if why := reason_to_refuse(config.to_dict()):
        raise UnsupportedModelError(f"{path}: holds a {config.model_type} model, which cannot be converted: {why}")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    model.tie_weights()
    try:
        joined = any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model))
        if joined or getattr(model, "_keep_in_fp32_modules", None):
            # transformers joins experts of the file into one tensor, and splits them again when it saves; some families
            # keep parts in float32
            numbers, missing = _dequantise_whole(location, config, folder, dtype)
        else:
            numbers, missing = write_dequantised(path, model, folder)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
    except ResourceError:
        raise
    except Exception as error:
        raise_if_full(error, folder)
        if is_out_of_memory(error):
            raise
        raise _unreadable(path, error) from None
    _require_complete(path, f"a {config.model_type} model", stored_numbers, numbers, missing)
    tokenizer.save_pretrained(folder)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read as GGUF: {one_line(error)}")


def _dequantise_whole(
    location: dict[str, str], config: "PretrainedConfig", folder: Path, dtype: str
) -> tuple[int, list[str]]:
    """Let transformers read the whole file into memory, and write the model without its tokenizer.

    Returns:
        The count of the model's numbers, and the names of parameters that are not in the file.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    # the oldest supported versions of transformers always dequantise, and have no GgufConfig
    if quantization := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = quantization(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(**location, config=config, trust_remote_code=False, **options)
    # transformers refuses to save a model that is still marked as quantised
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # without this, the oldest supported versions of transformers save experts under other names than checkpoints use
    model._weight_conversions = None
    model.save_pretrained(folder, max_shard_size="4GB")
    return sum(parameter.numel() for parameter in model.parameters()), sorted(info["missing_keys"])


def write_dequantised(path: Path, model: "PreTrainedModel", folder: Path) -> tuple[int, list[str]]:
    """Dequantise a file tensor by tensor into shards of safetensors.

    Args:
        model: the file's model without weights; it says which tensors there are, their names, shapes and dtype.

    Returns:
        The count of numbers that were written, and the names of the model's parameters that are not in the file.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    reader = GGUFReader(path)
    settings = load_gguf_checkpoint(str(path))["config"]
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
    names = get_gguf_hf_weights_map(model, processor)
    parameters = dict(model.named_parameters())  # tied ones under their first name
    stored = [tensor for tensor in reader.tensors if names.get(tensor.name) in parameters]
    shards = _shards(stored, model.dtype.itemsize)
    files = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    weight_map: dict[str, str] = {}
    with doing("dequantising"), counting(len(stored)) as advance:
        for file, shard in zip(files, shards, strict=True):
            tensors = {}
            for tensor in shard:
                name = names[tensor.name]
                tensors[name] = _dequantised(tensor, processor, names, model.dtype)
                if tensors[name].shape != parameters[name].shape:
                    raise ValueError(f"tensor '{tensor.name}' has the shape {list(tensors[name].shape)}")
                advance()
            write_tensors(folder / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        total = sum(parameters[name].numel() for name in weight_map) * model.dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return sum(parameters[name].numel() for name in weight_map), sorted(parameters.keys() - weight_map.keys())


def _shards(tensors: "list[ReaderTensor]", width: int) -> "list[list[ReaderTensor]]":
    """Distribute tensors, in their order, over shards of 1/16 of the model, at least SHARD_BYTES."""
    limit = max(SHARD_BYTES, sum(int(tensor.n_elements) for tensor in tensors) * width // 16)
    shards: list[list[ReaderTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = int(tensor.n_elements) * width
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _dequantised(
    tensor: "ReaderTensor", processor: "TensorProcessor", names: dict[str, str], dtype: "torch.dtype"
) -> "torch.Tensor":
    """Dequantise one tensor and bring its values into the order that transformers uses."""
    import torch
    from gguf import dequantize

    if tensor.name in EMBEDDINGS:  # the largest by far, and stored as they are: a block of rows at a time
        rows = [
            torch.from_numpy(dequantize(tensor.data[start : start + ROWS], tensor.tensor_type)).to(dtype)
            for start in range(0, len(tensor.data), ROWS)
        ]
        return torch.cat(rows)
    weights = dequantize(tensor.data, tensor.tensor_type)
    processed = processor.process(
        weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
    )
    return torch.from_numpy(processed.weights.copy()).to(dtype)


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


def _require_complete(path: Path, kind: str, stored_numbers: int, read: int, missing: list[str]) -> None:
    """Check that every parameter comes from the file, and that every number of the file is in a parameter.

    Args:
        kind: words for the model.
        stored_numbers: count of the numbers in the file's tensors.
        read: count of the numbers in the model's parameters.
        missing: names of parameters that transformers did not find in the file.

    Raises:
        CheckpointError: one of the two does not hold.
    """
    if missing:
        raise CheckpointError(
            f"{path}: transformers finds {len(missing)} tensors of {kind} not in it, first {missing[0]}; {INSTEAD}"
        )
    if stored_numbers != read:
        raise CheckpointError(
            f"{path}: holds {stored_numbers:,} numbers, of which transformers reads {read:,} into {kind}; {INSTEAD}"
        )
