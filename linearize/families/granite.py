"""Granite: embeddings, attention, residuals and logits have multipliers of their own."""

from linearize.families.family import family

GRANITE = family("granite", "Granite", logit_divisor="logits_scaling", covers="Granite 3.x, dense")
