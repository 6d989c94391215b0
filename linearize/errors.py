"""The project's exceptions, each with the exit code that it ends a command with."""

import difflib
import errno
import unicodedata
from collections.abc import Iterable
from pathlib import Path

# Unicode categories of characters that are no text: controls, invisible formats (right-to-left marks), halves of pairs
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# a full disk or quota, or the largest file allowed, as the system says it and as libraries in Rust print it
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory is used up: Python's own, or torch's on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def one_line(error: Exception, limit: int = 300) -> str:
    """Return the text of `error` without line breaks, cut after `limit` characters."""
    return " ".join(str(error)[: 10 * limit].split())[:limit]


def printable(text: str, *, keep: str = "") -> str:
    """Return a text without characters that would steer a terminal or hide what it says, as escapes: \\u001b.

    Args:
        keep: control characters that stay, such as line breaks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in STEERING
        else f"\\u{ord(character):04x}"
        for character in text
    )


def message_line(text: str, limit: int = 2000) -> str:
    """Return a message as one printable line of bounded length; its own line breaks become semicolons."""
    line = printable("; ".join(part.strip() for part in str(text)[: 4 * limit].splitlines() if part.strip()))
    return line if len(line) <= limit else f"{line[:limit]}… ({len(str(text)):,} characters)"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the allowed name closest to `name`, or "" if none is close."""
    names = list(allowed)
    anagrams = [candidate for candidate in names if sorted(candidate) == sorted(name)]  # swapped letters: gal, gla
    matches = anagrams or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""
