"""Command R7B: interleaved rotary, on the layers with a sliding window alone; scaled logits."""

from linearize.families.family import family

COHERE2 = family(
    "cohere2", "Cohere2", rotary_layers="sliding", logit_multiplier="logit_scale", covers="Command R7B, Command A"
)
