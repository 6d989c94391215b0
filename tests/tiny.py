"""A tiny random model of every family, with the feature that sets it apart turned on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
PROJECTIONS = ("_proj.w", "query_key_value.w", "dense.w")
ABSENT = object()
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "ministral": {"head_dim": 8, "sliding_window": 12, "layer_types": EVERY_OTHER},
    "ministral3": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 12, "layer_types": EVERY_OTHER,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 12, "layer_types": EVERY_OTHER},
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True, "num_key_value_heads": ABSENT},
    "olmo2": {},
    "olmo3": {"sliding_window": 12, "layer_types": EVERY_OTHER},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"attention_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5},
    "starcoder2": {"sliding_window": None, "use_bias": True},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True},
    "cohere2": {"sliding_window": 12, "layer_types": EVERY_OTHER, "logit_scale": 0.25},
    "mixtral": MIXTURE,
    "qwen3_moe": {**MIXTURE, "head_dim": 16},
    "olmoe": MIXTURE,
    "gpt_oss": {**MIXTURE, "head_dim": 8, "sliding_window": 12, "layer_types": EVERY_OTHER},
}  # fmt: skip


def family_config(model_type: str, **changes):
    settings = {**COMMON, **FAMILIES.get(model_type, {}), **changes}
    return AutoConfig.for_model(model_type, **{key: value for key, value in settings.items() if value is not ABSENT})


def family_base(model_type: str, seed: int = 0, **changes):
    """A random model whose attention is far from uniform and whose biases, norms and sinks are not at their start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(model_type, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in PROJECTIONS):
                parameter.mul_(8.0)
            elif name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
