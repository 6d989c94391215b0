"""Checkpoints on disk: open a source, read and write safetensors, and describe a written student.

Nothing here imports modeling code.
"""
