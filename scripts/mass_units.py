"""Measure `log_unit` of the mixers that can share a normaliser: the summed weight of a thousand tokens of text.

    python scripts/mass_units.py MODEL

For each mixer: the logarithm of the past's summed weights, averaged over heads and positions, on 1,024 tokens of the
sample text outside a window of 256. Prints its mean, least and largest value over the layers.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from linearize.data.samples import SAMPLES
from linearize.mixers.linear import FEATURE_MAPS
from linearize.mixers.registry import MIXERS
from linearize.modeling.linear_heads import LinearHeads
from linearize.modeling.loading import load_student
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert

TOKENS = 1024


def main() -> None:
    """Convert the model with each mixer in turn and print the masses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="base model: folder, .gguf file or hub id")
    model = parser.parse_args().model
    mixers = [(name, []) for name, entry in MIXERS.items() if entry.shares_normaliser({}) and "outside" in entry.mixes]
    mixers += [("linear", [f"mixer_options.feature_map={name}"]) for name in FEATURE_MAPS if name != "identity"]
    for name, sets in mixers:
        masses = log_masses(model, name, sets)
        label = " ".join([name, *sets])
        print(f"{label}: {sum(masses) / len(masses):.2f} ({min(masses):.2f} to {max(masses):.2f})", flush=True)


@torch.no_grad()
def log_masses(model: str, mixer: str, sets: list[str]) -> list[float]:
    """Convert `model` with every head linear, and return the logarithm of each layer's mean mass."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        config = load_config(None, {"mixer": mixer, "keep_softmax": "none"}, sets)
        convert(model, config, out=out, verify=False, progress=lambda line: None)
        student = load_student(out, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(out)(sample_text(), return_tensors="pt").input_ids[:, :TOKENS]
    masses: list[float] = []

    def record(module: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        masses.append(outputs[0][..., -1].mean().log().item())  # the last column carries the mass

    for module in student.modules():
        if isinstance(module, LinearHeads):
            module.structure.register_forward_hook(record)
    student(ids)
    return masses


def sample_text() -> str:
    """Return the first documents of the packaged sample as one text."""
    lines = SAMPLES["sample"].read_text(encoding="utf-8").splitlines()[:8]
    return " ".join(json.loads(line)["text"] for line in lines)


if __name__ == "__main__":
    main()
