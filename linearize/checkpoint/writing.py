"""Write output folders that appear complete or not at all, and place weight files in them."""

import contextlib
import errno
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

from linearize.checkpoint.names import MANIFEST
from linearize.errors import ConfigError, ResourceError

# ioctl that makes a reflink: two files that share their bytes until one is written (Linux, linux/fs.h)
FICLONE = 0x40049409
# bytes of one copying step; few, large steps, since each waits for the interpreter, which is importing meanwhile
COPY_BYTES = 2**27


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out` to write into.

    It is renamed to `out` when the block ends, and removed if the block fails. The unfinished folder is hidden and
    named after `out`, so that the next run clears what a killed run left.

    Raises:
        ConfigError: `out` may not be written, or another process is writing it.
        ResourceError: the disk is full.
    """
    check_target(out, overwrite=overwrite)
    out = out.resolve()  # replace the folder that a link points to, not the link
    partial = out.parent / f".{out.name}.partial"
    make_folder(partial)
    with alone_in(partial, out):
        try:
            for leftover in partial.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield partial
            _sync(partial)
            if out.exists():  # a folder cannot be renamed to one that holds files, so move the old one aside
                replaced = out.parent / f".{out.name}.replaced"
                shutil.rmtree(replaced, ignore_errors=True)
                out.rename(replaced)
                partial.rename(out)
                shutil.rmtree(replaced)
            else:
                partial.rename(out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise_if_full(error, out.parent)
            raise


@contextlib.contextmanager
def alone_in(folder: Path, out: Path) -> Iterator[None]:
    """Lock `folder` against other processes of this package until the block ends or the process dies.

    Args:
        out: the output that `folder` becomes, for the error.

    Raises:
        ConfigError: another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"--out: another process is writing {out}; wait for it, or choose another") from None
    except OSError:  # this file system has no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path, out: Path) -> None:
    """Raise the error of `alone_in` if another process has locked `folder`."""
    if folder.is_dir():
        with alone_in(folder, out):
            pass


def make_folder(folder: Path) -> None:
    """Make a folder and its parents.

    Raises:
        ConfigError: no permission to write there. ResourceError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {folder.parent}") from None
    except OSError as error:
        raise_if_full(error, folder.parent)
        raise ConfigError(f"--out: cannot write in {folder.parent}: {error.strerror}") from None


def check_target(out: Path, *, overwrite: bool) -> None:
    """Check that an output folder can be written at `out`.

    What exists there must be an empty folder, or an output of this package that may be overwritten.

    Raises:
        ConfigError: `out` cannot be written, or holds something else.
    """
    check_writable(out)
    if not out.exists():
        return
    if out.resolve() == Path.cwd():
        raise ConfigError(f"--out: {out} is the current folder, which cannot be replaced; name another")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"--out: {out} exists; choose another, or pass --overwrite to replace it")
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"--out: {out} was not written by linearize (no linearize.json), so it is not overwritten")


def check_writable(out: Path, option: str = "--out", *, folder: bool = True) -> None:
    """Check that an output can be written at `out`.

    The nearest parent that exists must be a folder with permission to write. If `out` exists itself, it must be a
    folder or a file, as `folder` says.

    Args:
        option: the command-line option that names `out`, for errors.
        folder: True if the output is a folder, False if it is a file.

    Raises:
        ConfigError: it cannot be written.
    """
    if out.exists() and out.is_dir() != folder:
        raise ConfigError(f"{option}: {out} exists and is {'not ' if folder else ''}a folder")
    above = out.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ConfigError(f"{option}: cannot write in {above}: Not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: no permission to write in {above}")


def raise_if_full(error: OSError, where: Path) -> None:
    """Raise a ResourceError if `error` says that the disk of `where` is full; otherwise return."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError(f"no space left on the disk of {where}") from None


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
    with open(source, "rb", buffering=0) as source_file, open(target, "wb", buffering=0) as target_file:
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


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one, so that readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
