"""SmolLM3: every fourth layer leaves queries and keys as they are."""

from linearize.families.family import family

SMOLLM3 = family("smollm3", "SmolLM3", rotary_layers="flagged", covers="SmolLM3")
