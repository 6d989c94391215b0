"""Features that set families apart, one at a time: each reaches linear and softmax heads, and leaving it out shows.

A linear head whose window reaches the first token, with its recurrent branch off, is softmax attention; so with half of
the heads linear and half kept the student has to give the base's logits. The same weights without the feature must not.
"""

import pytest
import torch
from helpers import LINEAR, VOCABULARY, family_base, family_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.conversion.planning import make_plan
from linearize.families.registry import find_family
from linearize.modeling.factory import linearized_classes
from linearize.settings.config import ConversionConfig

T = 40
HALF = ConversionConfig(window=64, sinks=2, keep_softmax="0:1,1:1,2:1,3:1", convert_layers="all")
FULL = {"layer_types": ["full_attention"] * 4, "sliding_window": 64}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 6.0]}


def rope(rope_type: str, **options) -> dict:
    return {"rope_parameters": {**PLAIN_ROPE, "rope_type": rope_type, **options}}


# feature -> (family, config with it, config without it)
BY_CONFIG = {
    "llama3 rotary": (
        "llama",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        rope("default"),
    ),
    "yarn rotary": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=128), rope("default")),
    "linear rotary": ("llama", rope("linear", factor=4.0), rope("default")),
    "dynamic rotary": (
        "llama",
        {**rope("dynamic", factor=4.0), "max_position_embeddings": 16},
        {**rope("default"), "max_position_embeddings": 16},
    ),
    "longrope": (
        "phi3",
        {
            **rope("longrope", **LONGROPE, original_max_position_embeddings=16),
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1.0,
        },
        {**rope("default"), "partial_rotary_factor": 1.0},
    ),
    "partial rotary, cut by the attention": ("phi", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.25}),
    "partial rotary, cut by the rotation": ("gpt_neox", {"rotary_pct": 0.25}, {"rotary_pct": 0.5}),
    "partial rotary in stablelm": ("stablelm", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.25}),
    "interleaved rotary on sliding layers": (
        "cohere2",
        {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"sliding_window": 64, "layer_types": ["full_attention"] * 4},
    ),
    "rotary by kind of layer": (
        "gemma3_text",
        {
            "sliding_window": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": PLAIN_ROPE,
            },
        },
        {
            "sliding_window": 64,
            "rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE},
        },
    ),
    "layers without rotary": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, {"no_rope_layers": [1, 1, 1, 1]}),
    "softcap": ("gemma2", {**FULL, "attn_logit_softcapping": 2.0}, {**FULL, "attn_logit_softcapping": None}),
    "softcap of the logits": (
        "gemma2", {**FULL, "final_logit_softcapping": 2.0}, {**FULL, "final_logit_softcapping": None},
    ),
    "query pre-attention scalar": (
        "gemma2", {**FULL, "query_pre_attn_scalar": 20}, {**FULL, "query_pre_attn_scalar": 256},
    ),
    "attention multiplier": ("granite", {"attention_multiplier": 0.4}, {"attention_multiplier": 0.1}),
    "residual multiplier": ("granite", {"residual_multiplier": 0.5}, {"residual_multiplier": 1.0}),
    "divided logits": ("granite", {"logits_scaling": 3.0}, {"logits_scaling": 1.0}),
    "multiplied logits": ("cohere2", {**FULL, "logit_scale": 0.25}, {**FULL, "logit_scale": 1.0}),
    "parallel residual": ("gpt_neox", {"use_parallel_residual": True}, {"use_parallel_residual": False}),
    "clipped projections": ("olmoe", {"clip_qkv": 0.05}, {"clip_qkv": None}),
    "scale of queries by position": (
        "ministral3",
        rope("default", llama_4_scaling_beta=2.0, original_max_position_embeddings=8),
        rope("default", llama_4_scaling_beta=0.0, original_max_position_embeddings=8),
    ),
}  # fmt: skip
# feature -> (family, config, parameters that carry it, what they are without it)
BY_WEIGHT = {
    "attention biases": ("llama", {"attention_bias": True}, "k_proj.bias", 0.0),
    "biases of queries in Qwen 2": ("qwen2", {}, "q_proj.bias", 0.0),
    "norm of each head's queries": ("qwen3", {}, "q_norm.weight", 3.0),
    "norm of the whole key projection": ("olmo2", {}, "k_norm.weight", 3.0),
    "layer norm of queries": ("phi", {"qk_layernorm": True}, "q_layernorm.weight", 3.0),
    "norms beside sliding windows": ("gemma3_text", {"sliding_window": 64}, "k_norm.weight", 3.0),
    "learned sinks": ("gpt_oss", FULL, "self_attn.sinks", -1e4),
    "bias of the output head": ("phi", {}, "lm_head.bias", 0.0),
}


def half_linear(base, model_type: str):
    """`base` with half of its heads linear and their window reaching everywhere."""
    family = find_family(model_type)
    config = base.config.to_dict()
    plan = make_plan(model_type, {**config, **family.heads(config)}, HALF)
    classes = linearized_classes(family)
    config.pop("model_type")
    student = classes.causal_lm(classes.config.from_dict({**config, "linearize": plan.to_dict()})).eval()
    missing, unexpected = student.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    return student


@torch.no_grad()
def assert_kept(base, without, model_type: str) -> None:
    ids = torch.randint(2, VOCABULARY, (1, T), generator=torch.Generator().manual_seed(1))
    student, wanted = half_linear(base, model_type), base(ids).logits
    assert {
        len(attention.linear_heads) > 0 < len(attention.softmax_heads) for _, attention in student.linear_attentions()
    } == {True}
    with student.recurrent_branch_off():
        torch.testing.assert_close(student(ids).logits, wanted, rtol=1e-4, atol=2e-5)
    assert (without(ids).logits - wanted).abs().max() > 3e-3


@pytest.mark.parametrize("feature", BY_CONFIG)
def test_a_feature_of_the_config(feature):
    model_type, changes, absent = BY_CONFIG[feature]
    base = family_base(model_type, **changes)
    without = AutoModelForCausalLM.from_config(family_config(model_type, **absent)).eval()
    without.load_state_dict(base.state_dict())
    assert_kept(base, without, model_type)


@pytest.mark.parametrize("feature", BY_WEIGHT)
def test_a_feature_of_the_weights(feature):
    model_type, changes, name, value = BY_WEIGHT[feature]
    base = family_base(model_type, **changes)
    state = base.state_dict()
    carriers = [key for key in state if key.endswith(name)]
    assert carriers
    without = AutoModelForCausalLM.from_config(base.config).eval()
    without.load_state_dict({key: torch.full_like(x, value) if key in carriers else x for key, x in state.items()})
    assert_kept(base, without, model_type)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_or_untied(tied):
    base = family_base("qwen2", tie_word_embeddings=tied)
    student = half_linear(base, "qwen2")
    same = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert same == tied


def test_a_tied_head_is_missing_under_the_name_that_checkpoints_give_it(tmp_path, cli):
    """GPT-NeoX's is embed_out on disk, whatever the class calls it."""
    base = family_base("gpt_neox", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert not any("embed_out" in name or "lm_head" in name for name in names)
    code, _, err = cli("convert", tmp_path / "base", "-o", tmp_path / "out", *LINEAR, "--no-verify")
    assert code == 0, err
