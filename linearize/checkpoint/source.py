"""Describe the source of a conversion: the model that the user named, as a local folder of safetensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.checkpoint.fingerprint import sha256
from linearize.checkpoint.json_file import LARGEST, read_object
from linearize.checkpoint.weights import sampled_values
from linearize.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# the largest counts of a config; those of any model that exists are far below
MOST = {
    "num_hidden_layers": 4096, "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14,
    "hidden_size": 2**20, "intermediate_size": 2**22, "moe_intermediate_size": 2**22, "vocab_size": 2**24,
    "num_experts": 2**14, "num_local_experts": 2**14, "n_routed_experts": 2**14, "num_labels": 2**16,
}  # fmt: skip


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
        ignore_unexpected: tensors that the model has no place for are kept, unused.
        merged_into: fingerprint of the base model that an adapter was merged into; empty for other kinds.
    """

    reference: str
    kind: str
    folder: Path
    name: str
    revision: str | None = None
    merged_into: str = ""
    ignore_unexpected: bool = False

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
    config = read_object(path)
    _check_counts(path, config)
    return config


def _check_counts(path: Path, config: dict[str, Any]) -> None:
    """Refuse counts that no model has, before anything is built from them."""
    for part in (part for part in (config, config.get("text_config")) if isinstance(part, dict)):
        for name, most in MOST.items():
            value = part.get(name)
            if value is not None and not (_is_number(value) and 0 <= value <= most):
                got = str(value)[:40]
                raise CheckpointError(f"{path}: {name}: got {got}, allowed are whole numbers up to {most:,}")
    for name, value in _leaves(config):
        if _is_number(value) and abs(value) > LARGEST:
            raise CheckpointError(f"{path}: {name}: got {str(value)[:40]}, which is out of range")
    vocabulary = config.get("vocab_size")
    for name in ("bos_token_id", "pad_token_id"):  # rows begin with the one, embeddings leave out the other
        value = config.get(name)
        if isinstance(value, int) and isinstance(vocabulary, int) and value >= vocabulary:
            raise CheckpointError(f"{path}: {name}: got {value}, the model has {vocabulary} tokens")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects and lists, each with its dotted key."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def local_fingerprint(model: str) -> str | None:
    """Return the fingerprint of a folder or file on this machine; None for a hub id."""
    path = Path(model).expanduser()
    return path_fingerprint(path) if path.is_file() or path.is_dir() else None


def path_fingerprint(path: Path) -> str:
    """Return the fingerprint of an existing checkpoint folder or file."""
    if not path.is_dir():
        return sha256(path)
    configs = [path / name for name in ("config.json", ADAPTER_CONFIG) if (path / name).is_file()]
    pieces = [config.read_bytes() for config in configs]
    for shard in sorted(path.glob("*.safetensors")):
        pieces += [shard.name.encode(), *sampled_values(shard)]
    return sha256(pieces)
