"""Name the files and tensors of a checkpoint folder that several modules refer to."""

import re

# the record of a conversion or a finetune
MANIFEST = "linearize.json"
# one line for each step of training
METRICS = "metrics.jsonl"
GENERATION_CONFIG = "generation_config.json"
# the added parameters before any training, beside a finetuned checkpoint
UNTRAINED = "untrained.safetensors"
# the number of a decoder layer in the name of a tensor
LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# part of the name of every tensor that a conversion adds
ADDED = ".mixer."
# files of a checkpoint folder besides weights and the files that travel unchanged (assets.py)
OWN_FILES = (
    MANIFEST, METRICS, "config.json", "model.safetensors.index.json", "README.md", "modeling_linearized.py",
)  # fmt: skip
# its folders, and patterns of the files in them
OWN_FOLDERS = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
    "additional_chat_templates": ("*.jinja",),
    "eval": ("results.json", "report.md", "report.html"),
    "eval/plots": ("*.png", "*.csv"),
    "eval/.stages": ("*",),
    "eval/.stages.removed": ("*",),
}
