"""Read a written checkpoint: its manifest, its tokenizer, the folder of its weights and the base it came from."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from linearize.checkpoint.names import MANIFEST
from linearize.checkpoint.open import open_source
from linearize.checkpoint.source import Source, local_fingerprint
from linearize.errors import CheckpointError, ConfigError, one_line

ADAPTER = "adapter"


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


# beside finetuned weights: the added parameters before any training
UNTRAINED_FILE = "untrained.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """linearize.json of a written checkpoint.

    Raises:
        ConfigError: no such folder, or not one that linearize wrote.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"MODEL: no folder '{folder}'; finetune and eval take a folder that `linearize convert` wrote"
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(
            f"MODEL: {folder} is not a linearized checkpoint (no {MANIFEST}); run `linearize convert` first"
        )
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or "kind" not in manifest or "base" not in manifest:
            raise ValueError("not a manifest")
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    return manifest


def tokenizer_of(folder: Path) -> Any:
    """A folder's tokenizer, None where it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare ones
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {one_line(error, 200)}") from None


def weights_folder(folder: Path) -> Path:
    """Where a checkpoint's weights lie: its own folder, of an adapter-only one its parent's."""
    if (folder / "config.json").is_file():
        return folder
    return parent_folder(folder, read_manifest(folder))


def parent_folder(folder: Path, manifest: dict[str, Any]) -> Path:
    """Where the checkpoint lies that an adapter-only folder was trained from.

    Raises:
        ConfigError: it is gone, or another than then.
    """
    trained = manifest["finetune"]
    parent = Path(trained["parent"])
    if not (parent / "config.json").is_file():
        raise ConfigError(
            f"MODEL: {folder} holds an adapter only, and the checkpoint that it belongs to, {parent}, is gone"
        )
    recorded = trained.get("parent_fingerprint")  # older manifests have none
    if recorded is not None and recorded != local_fingerprint(str(parent)):
        raise ConfigError(
            f"MODEL: {folder} holds an adapter only, and the checkpoint that it belongs to, {parent}, has changed since"
        )
    return parent


@contextlib.contextmanager
def open_base(manifest: dict[str, Any], override: str | None = None, *, option: str = "--base") -> Iterator[Source]:
    """The base model that a manifest records, or the one named instead of it by `option`.

    Raises:
        ConfigError: it is gone, or has changed since the conversion.
    """
    recorded = manifest["base"]
    reference = override or recorded["reference"]
    # what is not a hub id is recorded with its full path
    if override is None and Path(reference).is_absolute() and not Path(reference).exists():
        raise ConfigError(f"{option}: the recorded base '{reference}' is gone; name it with {option}")
    with open_source(
        reference,
        revision=recorded["revision"] if override is None else None,
        dtype=manifest["settings"]["dtype"],
        merge_adapter=override is None and recorded["kind"] == "adapter",
        text_model=override is None and recorded["kind"] == "text_model",
        option=option,
    ) as source:
        if override is None and source.fingerprint() != recorded["fingerprint"]:
            raise ConfigError(
                f"{option}: '{reference}' has changed since the conversion (fingerprint {source.fingerprint()[:12]}, "
                f"recorded {recorded['fingerprint'][:12]}); convert again, or name the right base with {option}"
            )
        yield source
