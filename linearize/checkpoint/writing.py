"""Writing a folder that appears whole or not at all."""

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

FICLONE = 0x40049409
COPY_BYTES = 2**27


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write into; renamed to `out` when the block ends, removed when it fails.

    The unfinished folder is hidden and named after `out`, so that whatever a killed run left is cleared by the next.
    """
    check_target(out, overwrite=overwrite)
    out = out.resolve()  # of a link the folder itself is replaced
    partial = out.parent / f".{out.name}.partial"
    make_folder(partial)
    with alone_in(partial, out):
        try:
            for left_over in partial.iterdir():
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield partial
            _sync(partial)
            if out.exists():
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
    """While the block runs, or until the process dies, no other of our processes writes in `folder`, which leads to `out`;
    refuses when one does already."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"--out: another process is writing {out}; wait for it, or choose another") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path, out: Path) -> None:
    """Refuses a folder in which another process is at work; see `alone_in`."""
    if folder.is_dir():
        with alone_in(folder, out):
            pass


def make_folder(folder: Path) -> None:
    """Makes a folder of an output and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise ConfigError(f"--out: no permission to write in {folder.parent}") from None
    except OSError as error:
        raise_if_full(error, folder.parent)
        raise ConfigError(f"--out: cannot write in {folder.parent}: {error.strerror}") from None


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuses an existing OUT unless it may be overwritten and looks like something of ours; and a place that nothing can
    be written to."""
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
    """Refuses an OUT in a folder without permission, below something that is not a folder, or that is a file where a folder is
    to be (or the reverse)."""
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
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError(f"no space left on the disk of {where}") from None


def check_space(where: Path, needed: int) -> None:
    """Fails before a byte is written when the disk cannot take `needed` bytes."""
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed:
        raise ResourceError(f"{where}: needs {needed / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free")


@contextlib.contextmanager
def placing(files: dict[Path, Path], link: str) -> Iterator[Callable[[], str]]:
    """Places files, source -> target, in the background; see `place` for `link`.

    Yields a function that waits for the last of them and returns how they were placed, "hard", "copy" or several with
    a plus. Leaving the block before that stops the copying.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(lambda: {place(source, target, link, stop) for source, target in files.items()})
        if link == "hard":  # takes no time, and where it cannot be done nothing else should be begun
            future.result()
        try:
            yield lambda: "+".join(sorted(future.result()))
        finally:
            stop.set()


def place(source: Path, target: Path, link: str, stop: threading.Event) -> str:
    """Puts the bytes of `source` at `target`; returns how: "hard", "reflink" or "copy".

    Args:
        link: "auto" tries a hard link, then a reflink, then copies; "hard" insists on the link; "copy" makes bytes of
            its own (a reflink where the file system shares them until written).
        stop: ends a copy early, half done.
    """
    source = source.resolve()  # a hub cache holds symbolic links; link to the file itself
    if link in ("auto", "hard"):
        try:
            os.link(source, target)
            return "hard"
        except OSError as error:
            if link == "hard":
                raise ConfigError(
                    f"--link hard: {target.parent} cannot hold a hard link to {source} ({error.strerror})"
                ) from None
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        try:
            fcntl.ioctl(write.fileno(), FICLONE, read.fileno())
            return "reflink"
        except OSError:
            pass
        _copy(read.fileno(), write.fileno(), stop)
    return "copy"


def _copy(read: int, write: int, stop: threading.Event) -> None:
    """Copies between descriptors in few, large steps: each one waits for the interpreter, which is importing."""
    if sys.platform == "linux":  # elsewhere sendfile only writes to sockets
        while not stop.is_set() and os.sendfile(write, read, None, COPY_BYTES):
            pass
    while not stop.is_set() and (block := os.read(read, COPY_BYTES)):
        while block:
            block = block[os.write(write, block) :]


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON through a temporary file, so that readers see the old or the new."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
