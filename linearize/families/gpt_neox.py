"""GPT-NeoX: one projection for queries, keys and values, partial rotary, attention and feed-forward in parallel."""

from linearize.families.family import family

GPT_NEOX = family(
    "gpt_neox",
    "GPTNeoX",
    decoder_attribute="gpt_neox",
    attention_attribute="attention",
    grouped=False,
    lora_targets=("query_key_value", "dense"),
    ignorable_tensors=(r"\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)$",),
    covers="Pythia, GPT-NeoX-20B, Dolly",
)
