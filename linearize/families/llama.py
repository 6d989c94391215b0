"""Llama: the plain case, nothing but the defaults."""

from linearize.families.family import family

LLAMA = family("llama", "Llama", covers="Llama 1, 2, 3.x, SmolLM2, TinyLlama")
