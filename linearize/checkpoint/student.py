"""Describe a written checkpoint as an object: its folder, manifest, weights, tokenizer and base model."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.auto import auto_tokenizer
from linearize.checkpoint.manifest import FinetuneRecord, Manifest
from linearize.checkpoint.names import MANIFEST, UNTRAINED
from linearize.checkpoint.open import open_source
from linearize.checkpoint.source import Source, local_fingerprint, read_config
from linearize.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# folder of the LoRA adapter in a finetuned checkpoint
ADAPTER = "adapter"
# a folder with one of these files has a tokenizer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# beside finetuned weights: the added parameters before any training
UNTRAINED_FILE = UNTRAINED


@dataclass(frozen=True)
class Student:
    """A checkpoint that `linearize convert` or `linearize finetune` wrote.

    Attributes:
        folder: the folder of linearize.json.
        manifest: the content of linearize.json.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: str | Path) -> "Student":
        """Read the checkpoint in `folder`.

        Raises:
            ConfigError: no such folder, or not one that linearize wrote.
            CheckpointError: its linearize.json is damaged or of a newer format version.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(
                f"MODEL: no folder '{folder}'; finetune and eval take a folder that `linearize convert` wrote"
            )
        path = folder / MANIFEST
        if not path.is_file():
            raise ConfigError(
                f"MODEL: {folder} is not a linearized checkpoint (no {MANIFEST}); run `linearize convert` first"
            )
        return cls(folder, Manifest.read(path))

    @property
    def kind(self) -> str:
        """Return the kind of the checkpoint: "converted", "finetuned" or "adapter"."""
        return self.manifest.kind

    @property
    def is_adapter_only(self) -> bool:
        """Return True if the folder holds a LoRA adapter and no model. The parent's folder holds the rest."""
        return self.kind == "adapter"

    @property
    def weights_folder(self) -> Path:
        """Return the folder of config.json and weights. That of an adapter is its parent's.

        Raises:
            ConfigError: the parent is gone, or has changed.
        """
        return self.parent().folder if self.is_adapter_only else self.folder

    @property
    def parent_folder(self) -> Path:
        """Return the folder of the checkpoint that this one was trained from, as recorded. It may be gone."""
        return Path(self._training().parent)

    def _training(self) -> FinetuneRecord:
        """Return the record of the training, which `Manifest` requires of all kinds but "converted"."""
        assert self.manifest.finetune is not None, "only a trained checkpoint has a parent"
        return self.manifest.finetune

    def parent(self) -> "Student":
        """Return the checkpoint that this adapter was trained from.

        Raises:
            ConfigError: it is gone, or has changed since.
        """
        parent = self.parent_folder
        if not (parent / "config.json").is_file():
            raise ConfigError(
                f"MODEL: {self.folder} holds an adapter only, and the checkpoint that it belongs to, {parent}, is gone"
            )
        recorded = self._training().parent_fingerprint  # older manifests have none
        if recorded is not None and recorded != local_fingerprint(str(parent)):
            raise ConfigError(
                f"MODEL: {self.folder} holds an adapter only, and the checkpoint that it belongs to, {parent}, has "
                "changed since"
            )
        return Student.read(parent)

    def read_config(self) -> dict[str, Any]:
        """Read the model's config.json, which for an adapter is its parent's."""
        return read_config(self.weights_folder)

    @contextlib.contextmanager
    def open_base(self, override: str | None = None, *, option: str = "--base") -> Iterator[Source]:
        """Open the base model that the manifest records, or `override` in its place.

        Args:
            option: the command-line option that names `override`, for errors.

        Raises:
            ConfigError: the recorded base is gone, or has changed since the conversion.
        """
        recorded = self.manifest.base
        reference = override or recorded.reference
        # everything but a hub id is recorded with its full path
        if override is None and Path(reference).is_absolute() and not Path(reference).exists():
            raise ConfigError(f"{option}: the recorded base '{reference}' is gone; name it with {option}")
        with open_source(
            reference,
            revision=recorded.revision if override is None else None,
            dtype=self.manifest.settings.dtype,
            merge_adapter=override is None and recorded.kind == "adapter",
            text_model=override is None and recorded.kind == "text_model",
            option=option,
        ) as source:
            if override is None and (fingerprint := source.fingerprint()) != recorded.fingerprint:
                raise ConfigError(
                    f"{option}: '{reference}' has changed since the conversion (fingerprint {fingerprint[:12]}, "
                    f"recorded {recorded.fingerprint[:12]}); convert again, or name the right base with {option}"
                )
            yield source

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `--json` prints: the folder as "output", then the manifest."""
        return {"output": str(self.folder.resolve()), **self.manifest.to_dict()}


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer of a checkpoint folder; None if it has no tokenizer files.

    Raises:
        ConfigError: it has code of its own, which the user does not trust.
        CheckpointError: the files are there, and cannot be loaded.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = auto_tokenizer(folder)
    tokenizer.embedded_tokens = _embedded_tokens(folder)
    return tokenizer


def _embedded_tokens(folder: Path) -> int | None:
    """Return the number of tokens that a checkpoint's model has embeddings for; None if its config does not say."""
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    part = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    return part.get("vocab_size") if isinstance(part, dict) else None
