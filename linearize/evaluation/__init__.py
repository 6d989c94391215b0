"""Measurements of `linearize eval`: one file each, and the suites, weights and stages around them."""
