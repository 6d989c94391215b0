"""List and copy the files of a checkpoint that travel unchanged: tokenizer, chat templates, licence."""

import shutil
from pathlib import Path

PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "LICENSE*", "LICENCE*", "license*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
FOLDERS = ("additional_chat_templates",)


def asset_files(folder: Path) -> list[Path]:
    """Return the tokenizer, chat-template, generation-config and licence files of `folder`, relative to it."""
    files = {path.relative_to(folder) for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    for name in FOLDERS:
        files |= {path.relative_to(folder) for path in folder.glob(f"{name}/*") if path.is_file()}
    return sorted(files)


def copy_assets(source: Path, target: Path, *more: str, without: tuple[str, ...] = ()) -> None:
    """Copy the asset files of one folder into another.

    Args:
        more: names of further files to copy, if they exist.
        without: names of files to leave out.
    """
    for asset in [*asset_files(source), *map(Path, more)]:
        if asset.name not in without and (source / asset).is_file():
            (target / asset).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / asset, target / asset)
