"""Name the files and tensors of a checkpoint folder that several modules refer to."""

# the record of a conversion or a finetune
MANIFEST = "linearize.json"
# one line for each step of training
METRICS = "metrics.jsonl"
GENERATION_CONFIG = "generation_config.json"
# the added parameters before any training, beside a finetuned checkpoint
UNTRAINED = "untrained.safetensors"
# part of the name of every tensor that a conversion adds
ADDED = ".mixer."
# entries of a checkpoint folder besides weights and the files that travel unchanged (assets.py); a folder's name stands
# for all in it
OWN_ENTRIES = (
    MANIFEST, METRICS, "config.json", "model.safetensors.index.json", "README.md", "modeling_linearized.py", "adapter",
    "eval",
)  # fmt: skip
