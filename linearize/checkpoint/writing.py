"""Place weight files in a folder, and write files that appear complete or not at all."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from linearize.errors import ConfigError, ResourceError, one_line, raise_if_full

# ioctl that makes a reflink: two files that share their bytes until one is written (Linux, linux/fs.h)
FICLONE = 0x40049409
# bytes of one copying step; few, large steps, since each waits for the interpreter, which is importing meanwhile
COPY_BYTES = 2**27


def check_space(where: Path, needed: int) -> None:
    """Raise a ResourceError if the disk of `where`, which may not exist yet, has less than `needed` bytes free."""
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed:
        raise ResourceError(f"{where}: needs {needed / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free")


@contextlib.contextmanager
def place_in_background(files: dict[Path, Path], link: str) -> Iterator[Callable[[], str]]:
    """Place files in a background thread while the block runs.

    Leaving the block before the yielded function has returned stops a copy in progress; see `place`.

    Args:
        files: target by source.
        link: as in `place`.

    Yields:
        A function that waits for the last file. It returns the methods that were used, joined by "+": "hard",
        "reflink", "copy".
    """
    stop = threading.Event()

    def place_all() -> set[str]:
        return {place(source, target, link, stop) for source, target in files.items()}

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(place_all)
        if link == "hard":  # takes no time; wait, so that a failure is raised before the block starts its work
            future.result()
        try:
            yield lambda: "+".join(sorted(future.result()))
        finally:
            stop.set()


def place(source: Path, target: Path, link: str, stop: threading.Event) -> str:
    """Place the content of one file at another path, by a hard link, a reflink or a copy.

    Args:
        link: the value of --link. "auto" tries a hard link, then a reflink, then a copy. "hard" requires a hard link.
            "copy" never makes one: it tries a reflink, which is as independent of the source as a copy, then a copy.
        stop: when it is set, a copy stops. The target is then incomplete, although "copy" is returned. Whoever sets
            `stop` must discard the target, as `atomic_folder` does.

    Returns:
        The method that was used: "hard", "reflink" or "copy".

    Raises:
        ConfigError: `link` is "hard", and no hard link can be made.
    """
    source = source.resolve()  # the hub's cache holds symbolic links; link to the file itself
    if link in ("auto", "hard"):
        try:
            os.link(source, target)
            return "hard"
        except OSError as error:
            if link == "hard":
                raise ConfigError(
                    f"--link hard: {target.parent} cannot hold a hard link to {source} ({error.strerror})"
                ) from None
    # "x": never into a file that is there, which may be a link to somebody's weights
    with open(source, "rb", buffering=0) as source_file, open(target, "xb", buffering=0) as target_file:
        try:
            fcntl.ioctl(target_file.fileno(), FICLONE, source_file.fileno())
            return "reflink"
        except OSError:  # this file system has no reflinks
            pass
        _copy(source_file.fileno(), target_file.fileno(), stop)
    return "copy"


def _copy(source: int, target: int, stop: threading.Event) -> None:
    """Copy from one file descriptor to another until the end or until `stop` is set."""
    if sys.platform == "linux":  # on other systems sendfile only writes to sockets
        while not stop.is_set() and os.sendfile(target, source, None, COPY_BYTES):
            pass
    while not stop.is_set() and (block := os.read(source, COPY_BYTES)):
        while block:  # one write may take a part only
            block = block[os.write(target, block) :]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield another path to write to; the file there, flushed to the disk, then takes the place of `path`.

    Raises:
        ResourceError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # never through a link that somebody has put there
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise_if_full(error, path.parent)
        raise


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors by way of a temporary file; see `_replacing`.

    Raises:
        ResourceError: the disk is full, or the system does not let the file be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
        except SafetensorError as error:
            raise_if_full(error, path.parent)
            raise ResourceError(f"{path}: cannot be written: {one_line(error)}") from None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content by way of a temporary file, and never into a file that is there."""
    with _replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one, so that readers see the old file or the new one, never a part."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
