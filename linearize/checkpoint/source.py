"""Where a model comes from: a folder of safetensors, a hub id or a GGUF file, brought to a local folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.weights import sampled_values
from linearize.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """A checkpoint at hand.

    Attributes:
        reference: what the user named: absolute path or hub id.
        kind: "folder", "hub", "gguf", "adapter" (a PEFT adapter merged into its base model) or "text_model" (of a
            model for images or sound).
        folder: local folder with config.json and safetensors.
        name: for people and model cards.
        revision: commit of a hub model, if known.
        merged_into: of an adapter, the fingerprint of its base model.
    """

    reference: str
    kind: str
    folder: Path
    name: str
    revision: str | None = None
    merged_into: str = ""

    def read_config(self) -> dict:
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: no config.json")
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: got a {type(config).__name__}, allowed is an object")
        return config

    def describe(self) -> dict:
        """What linearize.json records of it, with hashes that later tell whether the base has changed."""
        return {
            "reference": self.reference,
            "kind": self.kind,
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Changes when the config or any tensor's name, shape or values change (see `sampled_values`); of a GGUF file, when
        its bytes do.

        Raises:
            CheckpointError: a damaged safetensors file.
        """
        if self.kind == "adapter":
            return sha256([self.merged_into.encode(), local_fingerprint(self.reference).encode()])
        return local_fingerprint(self.reference if self.kind == "gguf" else str(self.folder))


def local_fingerprint(model: str) -> str | None:
    """Of a folder or file on this machine; None of a hub id."""
    path = Path(model).expanduser()
    if not path.is_dir():
        return sha256(path) if path.is_file() else None
    configs = [path / name for name in ("config.json", ADAPTER_CONFIG) if (path / name).is_file()]
    pieces = [config.read_bytes() for config in configs]
    for shard in sorted(path.glob("*.safetensors")):
        pieces += [shard.name.encode(), *sampled_values(shard)]
    return sha256(pieces)
