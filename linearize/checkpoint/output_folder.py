"""Write output folders that appear complete or not at all, and refuse places where something would get lost."""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from linearize.checkpoint.assets import is_asset
from linearize.checkpoint.auto import tokenizer_code
from linearize.checkpoint.json_file import read_object
from linearize.checkpoint.names import MANIFEST, OWN_FILES, OWN_FOLDERS, UNTRAINED
from linearize.checkpoint.work_folder import MARK, alone_in, claim, empty, is_ours, mark, remove
from linearize.errors import CheckpointError, ConfigError, raise_if_full

# renameat2 of Linux' libc: relative to the current folder, two paths change places
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# folders on the way to an output
MOST_FOLDERS = 200


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a folder beside `out` to write into.

    It takes the place of `out` when the block ends, and is removed if the block fails. The unfinished folder is hidden
    and named after `out`, so that the next run clears what a killed run left. At any moment `out` is the old output or
    the new one, or the old one waits beside it and the next run puts it back.

    Args:
        reads: paths that are read in the meantime; see `check_target`.

    Raises:
        ConfigError: `out` may not be written, or another process is writing it.
        ResourceError: the disk is full.
    """
    check_target(out, overwrite=overwrite, reads=reads)
    out = out.resolve()  # replace the folder that a link points to, not the link
    partial = _partial(out)
    with without_new_parents(out.parent):
        claim(partial)
        with alone_in(partial, out):
            try:
                empty(partial)
                yield partial
                sync(partial)
                _put_in_place(partial, out)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    remove(partial)
                if isinstance(error, OSError):
                    raise_if_full(error, out.parent)
                raise


def _put_in_place(partial: Path, out: Path) -> None:
    """Let a finished folder take the place of `out`."""
    if not out.exists():
        partial.rename(out)
    else:
        mark(out)  # the old output may be removed once the new one is there
        if _exchange(partial, out):
            remove(partial)
        else:
            replaced = _replaced(out)
            out.rename(replaced)
            partial.rename(out)
            remove(replaced)
    (out / MARK).unlink()
    sync(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _partial(out: Path) -> Path:
    """Return the place of an output that is being written."""
    return out.parent / f".{out.name}.partial"


def _replaced(out: Path) -> Path:
    """Return the place of an old output between two renames."""
    return out.parent / f".{out.name}.replaced"


def restore(out: Path) -> None:
    """Go on with a replacement that a killed run had begun: put the old output back, or clear it away."""
    out = out.resolve()
    replaced = _replaced(out)
    with contextlib.suppress(OSError, ConfigError):
        if not out.exists():
            if is_ours(replaced):
                replaced.rename(out)
                (out / MARK).unlink()
        elif is_ours(out):  # the new one, or the old one just before
            with alone_in(out, out):
                for old in filter(is_ours, (replaced, _partial(out))):
                    with alone_in(old, out):  # nobody is still writing it
                        remove(old)
                (out / MARK).unlink()


@contextlib.contextmanager
def without_new_parents(parent: Path) -> Iterator[None]:
    """Remove the folders on the way to `parent` that were made inside the block, if it fails."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something else lies in it by now
            for folder in missing:
                folder.rmdir()
        raise


def check_target(out: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Check that an output folder can be written at `out`.

    What exists there must be an empty folder, or an output of this package and nothing else that may be overwritten.

    Args:
        reads: files and folders that the command reads; none may lie in `out`.

    Raises:
        ConfigError: `out` cannot be written, or holds something else.
    """
    check_writable(out)
    restore(out)
    if not out.exists():
        return
    target = out.resolve()
    if target == Path.cwd():
        raise ConfigError(f"--out: {out} is the current folder, which cannot be replaced; name another")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"--out: {out} exists; choose another, or pass --overwrite to replace it")
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"--out: {out} was not written by linearize (no linearize.json), so it is not overwritten")
    for path in (*reads, Path.cwd()):
        if target in (resolved := path.resolve(), *resolved.parents):
            raise ConfigError(f"--out: {out} holds {path}, which is being read; name another folder")
    if foreign := foreign_entry(out):
        raise ConfigError(
            f"--out: {out} holds '{foreign}', which is not part of a checkpoint and would get lost; move it away, or "
            "name another folder"
        )


def foreign_entry(out: Path) -> str | None:
    """Return the path of something in an output folder that this package does not write; None if there is nothing."""
    files = {*OWN_FILES, MARK, *weight_names(out)}
    with contextlib.suppress(CheckpointError):
        files |= set(tokenizer_code(out))
    for entry in sorted(out.rglob("*")):
        path = entry.relative_to(out)
        if entry.is_dir() and not entry.is_symlink():
            known = path.as_posix() in OWN_FOLDERS
        elif len(path.parts) == 1:
            known = path.name in files or is_asset(entry)
        else:
            patterns = OWN_FOLDERS.get(path.parent.as_posix(), ())
            known = any(fnmatch(path.name, pattern) for pattern in patterns)
        if not known:
            return path.as_posix()
    return None


def weight_names(out: Path) -> set[str]:
    """Return the names of the weight files of an output folder, as its records have them."""
    names = {"model.safetensors", UNTRAINED}
    for file, *keys in ((MANIFEST, "weights", "files"), ("model.safetensors.index.json", "weight_map")):
        with contextlib.suppress(CheckpointError, KeyError, TypeError):
            value = read_object(out / file)
            for key in keys:
                value = value[key]
            names |= {str(name) for name in (value.values() if isinstance(value, dict) else value)}
    return names


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
    try:
        exists, above = out.exists(), out.absolute().parent
        while not above.exists():
            above = above.parent
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        raise ConfigError(f"{option}: no file can have that name ({error})") from None
    if exists and out.is_dir() != folder:
        raise ConfigError(f"{option}: {out} exists and is {'not ' if folder else ''}a folder")
    if len(out.parts) > MOST_FOLDERS:
        raise ConfigError(f"{option}: {str(out)[:60]}… lies in more than {MOST_FOLDERS} folders")
    if not folder and out.is_fifo():
        raise ConfigError(f"{option}: {out} is a pipe, whose reader may never come; name a file")
    if out.is_symlink() and not exists:
        raise ConfigError(f"{option}: {out} is a link to nothing; remove it, or name another")
    if not above.is_dir():
        raise ConfigError(f"{option}: cannot write in {above}: Not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: no permission to write in {above}")


def sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
