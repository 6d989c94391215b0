"""List and copy the files of a checkpoint that travel unchanged: tokenizer, chat templates, licence."""

from fnmatch import fnmatch
from pathlib import Path

from linearize.checkpoint.writing import copy_file

PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "LICENSE*", "LICENCE*", "license*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
FOLDERS = ("additional_chat_templates",)
# folder names of a hub's cache, whose snapshots are links into its blobs
SNAPSHOTS, BLOBS = "snapshots", "blobs"


def is_asset(path: Path) -> bool:
    """Return True if a file or folder, by its name, is one that travels unchanged."""
    return path.name in FOLDERS or any(fnmatch(path.name, pattern) for pattern in PATTERNS)


def asset_files(folder: Path) -> list[Path]:
    """Return the tokenizer, chat-template, generation-config and licence files of `folder`, relative to it.

    A link that leaves the folder is none of them, unless it leads into the blobs of a hub's cache.
    """
    found = [path for pattern in PATTERNS for path in folder.glob(pattern)]
    found += [path for name in FOLDERS for path in folder.glob(f"{name}/*")]
    return sorted({path.relative_to(folder) for path in found if path.is_file() and belongs_to(path, folder)})


def belongs_to(path: Path, folder: Path) -> bool:
    """Return True if a file that is named in `folder` lies in it, or among the blobs of the hub's cache around it."""
    inside = [folder.resolve()]
    if inside[0].parent.name == SNAPSHOTS:
        inside.append(inside[0].parent.parent / BLOBS)
    return any(place in path.resolve().parents for place in inside)


def copy_assets(source: Path, target: Path, *more: str, without: tuple[str, ...] = ()) -> None:
    """Copy the asset files of one folder into another, but not over weights.

    Args:
        more: names of further files to copy, if they exist.
        without: names of files to leave out.
    """
    for asset in [*asset_files(source), *map(Path, more)]:
        path = source / asset
        if asset.name in without or asset.suffix == ".safetensors" or not path.is_file():
            continue
        if not belongs_to(path, source):
            continue
        (target / asset).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / asset, target / asset)
