"""Recurrences and window attention as tensor operators, each with a naive twin and a fast version."""
