"""The project's exceptions and the exit codes they end a command with."""

import difflib
from collections.abc import Iterable


class LinearizeError(Exception):
    """A failure with a message a user can act on. Exit code 1: runtime failure."""

    exit_code = 1


class ConfigError(LinearizeError):
    """Wrong usage, configuration or data. Exit code 2."""

    exit_code = 2


class UnsupportedModelError(LinearizeError):
    """A model that cannot be converted, and why. Exit code 4."""

    exit_code = 4


class ResourceError(LinearizeError):
    """Out of memory or disk. Exit code 5."""

    exit_code = 5


class CheckpointError(LinearizeError):
    """A checkpoint that is missing, damaged or not what it says. Exit code 1."""


class CoverageError(LinearizeError):
    """Planned and converted heads differ, or keys are missing or unexpected. Exit code 1."""


class Interrupted(LinearizeError):
    """Stopped by the user; the work so far is kept. Exit code 130."""

    exit_code = 130


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's text without its line breaks, cut after `limit` characters."""
    return " ".join(str(error).split())[:limit]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the closest allowed name, or nothing."""
    names = list(allowed)
    swapped = [known for known in names if sorted(known) == sorted(name)]  # letters in another order
    match = swapped or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""
