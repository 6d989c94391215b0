"""The recurrences and the window as tensor operators: a naive twin, a chunked version and the choice of kernels."""
