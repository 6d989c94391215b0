"""The project's exceptions, each with the exit code that it ends a command with."""

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

# a full disk or quota, as the system says it and as libraries in Rust print it
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE_TEXT = tuple(f"os error {number}" for number in NO_SPACE)


class LinearizeError(Exception):
    """A failure that the user can act on; the message says how. Exit code 1."""

    exit_code = 1


class ConfigError(LinearizeError):
    """Wrong usage, configuration or data. Exit code 2."""

    exit_code = 2


class UnsupportedModelError(LinearizeError):
    """A model that cannot be converted; the message says why. Exit code 4."""

    exit_code = 4


class ResourceError(LinearizeError):
    """Too little memory or disk space. Exit code 5."""

    exit_code = 5


class CheckpointError(LinearizeError):
    """A checkpoint that is missing, damaged or inconsistent with its own description. Exit code 1."""


class CoverageError(LinearizeError):
    """A conversion whose heads or tensors differ from its plan. Exit code 1."""


class Interrupted(LinearizeError):
    """A command that the user stopped; finished work stays on disk. Exit code 130."""

    exit_code = 130


def is_full(error: BaseException) -> bool:
    """Return True if an error says that a disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_SPACE
    return any(text in str(error) for text in NO_SPACE_TEXT)


def raise_if_full(error: BaseException, where: Path) -> None:
    """Raise a ResourceError if `error` says that the disk of `where` is full; otherwise return."""
    if is_full(error):
        raise ResourceError(f"no space left on the disk of {where}") from None


def one_line(error: Exception, limit: int = 300) -> str:
    """Return the text of `error` without line breaks, cut after `limit` characters."""
    return " ".join(str(error).split())[:limit]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the allowed name closest to `name`, or "" if none is close."""
    names = list(allowed)
    anagrams = [candidate for candidate in names if sorted(candidate) == sorted(name)]  # swapped letters: gal, gla
    matches = anagrams or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""
