"""Name the files and tensors of a checkpoint folder that several modules refer to."""

# the record of a conversion or a finetune
MANIFEST = "linearize.json"
# one line for each step of training
METRICS = "metrics.jsonl"
# part of the name of every tensor that a conversion adds
ADDED = ".mixer."
