"""Phi-3: one projection for queries, keys and values; long contexts through longrope."""

from linearize.families.family import family

PHI3 = family("phi3", "Phi3", lora_targets=("qkv_proj", "o_proj"), covers="Phi-3, 3.5, 4, 4-mini")
