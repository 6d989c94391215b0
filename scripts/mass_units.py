"""Measures `log_unit` of the structures that can share a normaliser: the mass that a thousand tokens of text come to.

    python scripts/mass_units.py MODEL

Prints log(mean over heads and positions of the past's summed weights) over 1024 tokens of the sample text outside a
window of 256, layer by layer: mean, least, largest.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from linearize.data.samples import SAMPLES
from linearize.mixers.linear import FEATURE_MAPS
from linearize.mixers.registry import MIXERS
from linearize.modeling.branch import LinearHeads
from linearize.modeling.loading import load_student
from linearize.settings.loading import load_config
from linearize.workflows.convert import convert


@torch.no_grad()
def main() -> None:
    rows = [(name, []) for name, entry in MIXERS.items() if entry.shares_normaliser({}) and "outside" in entry.mixes]
    rows += [("linear", [f"mixer_options.feature_map={name}"]) for name in FEATURE_MAPS if name != "identity"]
    lines = SAMPLES["sample"].read_text(encoding="utf-8").splitlines()[:8]
    text = " ".join(json.loads(line)["text"] for line in lines)
    for name, sets in rows:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            convert(
                sys.argv[1],
                load_config(None, {"mixer": name, "keep_softmax": "none"}, sets),
                out=out,
                verify=False,
                progress=lambda _: None,
            )
            student = load_student(out, dtype=torch.float32)
            ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt").input_ids[:, :1024]
        masses: list[float] = []

        def listen(module, inputs, result, masses=masses) -> None:
            masses.append(result[0][..., -1].mean().log().item())

        for module in student.modules():
            if isinstance(module, LinearHeads):
                module.structure.register_forward_hook(listen)
        student(ids)
        settings = " ".join([name, *sets])
        print(f"{settings}: {sum(masses) / len(masses):.2f} ({min(masses):.2f} to {max(masses):.2f})", flush=True)


if __name__ == "__main__":
    main()
