"""Phi: biases everywhere, the output head included, and rotary on part of each head."""

from linearize.families.family import family

PHI = family(
    "phi",
    "Phi",
    lora_targets=("q_proj", "k_proj", "v_proj", "dense"),
    partial_rotary=True,
    covers="Phi-1, 1.5, 2",
)
