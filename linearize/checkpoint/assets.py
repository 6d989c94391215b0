"""The files of a checkpoint that travel verbatim, and those a conversion writes itself."""

import shutil
from pathlib import Path

VERBATIM = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "LICENSE*", "LICENCE*", "license*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
FOLDERS = ("additional_chat_templates",)


def asset_files(folder: Path) -> list[Path]:
    """Tokenizer, chat templates, generation config and licence files of `folder`, relative to it."""
    found = {path.relative_to(folder) for pattern in VERBATIM for path in folder.glob(pattern) if path.is_file()}
    for name in FOLDERS:
        found |= {path.relative_to(folder) for path in folder.glob(f"{name}/*") if path.is_file()}
    return sorted(found)


def copy_assets(origin: Path, folder: Path, *more: str, without: tuple[str, ...] = ()) -> None:
    """Copies the asset files of `origin`, and `more` by name where they are there, into `folder`; `without` some by name."""
    for asset in [*asset_files(origin), *map(Path, more)]:
        if asset.name not in without and (origin / asset).is_file():
            (folder / asset).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin / asset, folder / asset)
