"""Facts about base architectures, as data."""
