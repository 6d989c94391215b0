"""Llama: the plain case, nothing but the defaults."""

from linearize.families.family import Family

LLAMA = Family(
    model_type="llama",
    config_class="LlamaConfig",
    causal_lm_class="LlamaForCausalLM",
    decoder_class="LlamaModel",
    attention_class="LlamaAttention",
    ignorable_tensors=(r"rotary_emb\.inv_freq$",),
    covers="Llama 1, 2, 3.x, SmolLM2, TinyLlama",
)
