"""Own folders for unfinished work: made with a mark, taken over only with it, locked while they are in use."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from linearize.errors import ConfigError, ResourceError, raise_if_full

# a file that says that this package made a folder, and may empty it
MARK = ".linearize-unfinished"


def claim(folder: Path, option: str = "--out") -> None:
    """Make a folder with a mark, or take over one that an earlier run left.

    Args:
        option: the command-line option that names the folder's place, for errors.

    Raises:
        ConfigError: a link, a file or somebody else's folder stands there, or it cannot be written.
        ResourceError: the disk is full.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{option}: {folder} is in the way: not a folder; remove it, or choose another output")
    if folder.is_dir() and not is_ours(folder) and any(folder.iterdir()):
        raise ConfigError(
            f"{option}: {folder} is in the way: linearize did not make it (it has no {MARK}); remove it, or choose "
            "another output"
        )
    make_folder(folder, option)
    if is_ours(_going(folder)):
        _wipe(_going(folder))
    try:
        mark(folder)
    except OSError as error:
        raise_if_full(error, folder.parent)
        raise ConfigError(f"{option}: cannot write in {folder}: {error.strerror}") from None


def mark(folder: Path) -> None:
    """Give a folder the mark; a link in its place goes."""
    if (folder / MARK).is_symlink():
        (folder / MARK).unlink()
    os.close(os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644))


def is_ours(folder: Path) -> bool:
    """Return True if this package made a folder: it is one, not a link, and has the mark."""
    path = folder / MARK
    return folder.is_dir() and not folder.is_symlink() and path.is_file() and not path.is_symlink()


def empty(folder: Path) -> None:
    """Remove everything in a folder that `claim` made, but for the mark."""
    for entry in folder.iterdir():
        if entry.name != MARK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def remove(folder: Path) -> None:
    """Remove a folder that `claim` made; a folder of anybody else is left alone.

    It is renamed first, so that a killed process leaves all of it or, under another name, what the next one clears.
    """
    if not is_ours(folder):
        return
    going = _going(folder)
    _wipe(going)
    if not going.exists():
        folder.rename(going)
        folder = going
    _wipe(folder)


def _going(folder: Path) -> Path:
    """Return the name of a folder while it is removed."""
    return folder.with_name(f"{folder.name}.removed")


def _wipe(folder: Path) -> None:
    """Remove a folder with the mark, the mark last; and one that is empty, where a removal was stopped just before."""
    if is_ours(folder):
        empty(folder)
        (folder / MARK).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


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


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make a folder and its parents.

    Raises:
        ConfigError: no permission to write there. ResourceError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise ConfigError(f"{option}: no permission to write in {folder.parent}") from None
    except RecursionError:
        raise ConfigError(f"{option}: {folder} lies in too many folders") from None
    except OSError as error:
        raise_if_full(error, folder.parent)
        raise ConfigError(f"{option}: cannot write in {folder.parent}: {error.strerror}") from None


@contextlib.contextmanager
def temporary_folder(purpose: str, near: Path | None = None) -> Iterator[Path]:
    """Yield a folder that is removed afterwards. Those that killed processes have left are removed first.

    Args:
        purpose: a word that tells whoever sees the folder on the disk what it is for.
        near: a folder, perhaps not there yet, on whose disk it is to be; None: the system's temporary folder.

    Raises:
        ResourceError: the disk is full.
    """
    place = Path(tempfile.gettempdir()) if near is None else near.resolve()
    while not place.is_dir():
        place = place.parent
    prefix = f"{'' if near is None else '.'}linearize-{purpose}-"
    _remove_abandoned(place, prefix)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    except OSError as error:
        raise_if_full(error, place)
        raise ResourceError(f"{place}: cannot make a temporary folder: {error.strerror}") from None
    try:
        with alone_in(folder, folder):  # before it has the mark by which others would take it for abandoned
            claim(folder)
            yield folder
    finally:
        with contextlib.suppress(OSError):
            remove(folder)


def _remove_abandoned(place: Path, prefix: str) -> None:
    """Remove temporary folders whose processes have died."""
    for folder in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError, ConfigError):
            if is_ours(folder) and folder.stat().st_uid == os.getuid():
                with alone_in(folder, folder):
                    remove(folder)
