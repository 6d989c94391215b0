"""StableLM: rotary on part of each head."""

from linearize.families.family import family

STABLELM = family(
    "stablelm",
    "StableLm",
    partial_rotary=True,
    layers_drop_keywords=True,
    covers="StableLM 2, StableLM 3B, Stable Code",
)
