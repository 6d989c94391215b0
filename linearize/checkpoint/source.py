"""Describe the source of a conversion: the model that the user named, as a local folder of safetensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.json_file import read_object
from linearize.checkpoint.weights import sampled_values
from linearize.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """A model in a local folder.

    Attributes:
        reference: the name that the user gave, as an absolute path or a hub id.
        kind: "folder", "hub", "gguf", "adapter" (a PEFT adapter merged into its base model) or "text_model" (taken out
            of a model for images or sound).
        folder: local folder with config.json and safetensors.
        name: short name for messages and model cards.
        revision: commit of a hub model, if known.
        merged_into: fingerprint of the base model that an adapter was merged into; empty for other kinds.
    """

    reference: str
    kind: str
    folder: Path
    name: str
    revision: str | None = None
    merged_into: str = ""

    def read_config(self) -> dict[str, Any]:
        """Read the model's config.json; see the function `read_config`."""
        return read_config(self.folder)

    def describe(self) -> dict[str, Any]:
        """Return the record for linearize.json, with a fingerprint that later shows if the base has changed."""
        return {
            "reference": self.reference,
            "kind": self.kind,
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Return a digest that identifies the model.

        It covers the config, and the name, shape and a sample of the values of every tensor (`sampled_values`). For a
        GGUF file it covers all bytes; for an adapter, the adapter's own files and the base that it was merged into.

        Raises:
            CheckpointError: a safetensors file is damaged.
        """
        if self.kind == "adapter":
            return sha256([self.merged_into.encode(), path_fingerprint(Path(self.reference)).encode()])
        return path_fingerprint(Path(self.reference) if self.kind == "gguf" else self.folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json in a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json")
    return read_object(path)


def local_fingerprint(model: str) -> str | None:
    """Return the fingerprint of a folder or file on this machine; None for a hub id."""
    path = Path(model).expanduser()
    return path_fingerprint(path) if path.exists() else None


def path_fingerprint(path: Path) -> str:
    """Return the fingerprint of an existing checkpoint folder or file."""
    if not path.is_dir():
        return sha256(path)
    configs = [path / name for name in ("config.json", ADAPTER_CONFIG) if (path / name).is_file()]
    pieces = [config.read_bytes() for config in configs]
    for shard in sorted(path.glob("*.safetensors")):
        pieces += [shard.name.encode(), *sampled_values(shard)]
    return sha256(pieces)
