"""The linearized model inside transformers: attention, cache, classes, registration and the portable file."""
