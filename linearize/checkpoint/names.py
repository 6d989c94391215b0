"""Names in a checkpoint folder that more than one module has to know."""

# what a conversion records of itself, and a training run of its steps
MANIFEST, METRICS = "linearize.json", "metrics.jsonl"
# in the name of every tensor that a conversion adds
ADDED = ".mixer."
