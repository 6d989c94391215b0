"""Gemma 3, text: norms on queries and keys; layers with a sliding window rotate by a base of their own."""

from linearize.families.family import family

GEMMA3_TEXT = family(
    "gemma3_text",
    "Gemma3",
    module="gemma3",
    config_class="Gemma3TextConfig",
    decoder_class="Gemma3TextModel",
    covers="Gemma 3 270M and 1B",
)
