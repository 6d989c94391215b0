"""Checkpoints on disk: open a source, read and write safetensors, describe a written student. Imports no modeling code."""
