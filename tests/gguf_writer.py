"""Write a model as a GGUF file, as llama.cpp's converter does."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from linearize.families.registry import find_family


def stored(name: str, tensor: torch.Tensor, arch: str, config):
    """(name, values) of what llama.cpp's converter makes of a tensor."""
    if name.endswith("experts.gate_up_proj"):
        for part, values in zip(("gate", "up"), tensor.chunk(2, dim=1)):
            yield f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight", values
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", tensor
    elif arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs beside each other
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        yield name, tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
    else:
        yield name, tensor + 1 if arch.startswith("gemma") and name.endswith("norm.weight") else tensor


def write_gguf(base: PreTrainedModel, tokenizer, path: Path, arch: str) -> None:
    """A float32 GGUF file, as llama.cpp's converter lays it out."""
    import gguf

    config, writer = base.config, gguf.GGUFWriter(path, arch)
    settings, head_dim = config.to_dict(), find_family(config.model_type).heads(config.to_dict())["head_dim"]
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    for add, name in (
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"), (writer.add_layer_norm_eps, "layer_norm_eps"),
        (writer.add_layer_norm_eps, "norm_epsilon"), (writer.add_sliding_window, "sliding_window"),
        (writer.add_attn_logit_softcapping, "attn_logit_softcapping"),
        (writer.add_final_logit_softcapping, "final_logit_softcapping"), (writer.add_expert_count, "num_experts"),
        (writer.add_expert_count, "num_local_experts"), (writer.add_expert_used_count, "num_experts_per_tok"),
        (writer.add_expert_feed_forward_length, "moe_intermediate_size"),
    ):  # fmt: skip
        if settings.get(name) is not None:
            add(settings[name])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        inverse = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (inverse / base.model.rotary_emb.inv_freq).float().numpy())
    if rope["rope_type"] == "longrope":
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", torch.tensor(rope[f"{kind}_factor"]).numpy())
    writer.add_tokenizer_model("gpt2")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_list([token for token, _ in sorted(backend["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_types([1] * len(backend["vocab"]))
    writer.add_token_scores([0.0] * len(backend["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in base.state_dict().items():
        if name not in set(base.all_tied_weights_keys):
            for part, values in stored(name, tensor, arch, config):
                found = names.get_name(part, try_suffixes=(".weight", ".bias")) or part
                writer.add_tensor(found, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
