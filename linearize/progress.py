"""Tell how far a long computation is. Whoever computes counts; whoever shows progress takes a snapshot at any time.

with doing("scoring heads"), counting(30) as advance:
    for layer in layers:
        ...
        advance()
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace


@dataclass
class Snapshot:
    """A computation that is under way.

    Attributes:
        name: words for it; empty if nothing is under way.
        done, total: steps; total is 0 if nobody counts them.
        started: time.monotonic() at which this count began.
    """

    name: str = ""
    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Return the time since the count began."""
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float | None:
        """Return the time that the rest will take at the same rate; None before the first step."""
        return self.seconds * (self.total - self.done) / self.done if self.done else None


_current = Snapshot()


def snapshot() -> Snapshot:
    """Return what is under way."""
    return replace(_current)


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """Name what is done inside."""
    global _current
    before = _current
    _current = Snapshot(name)
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def counting(total: int) -> Iterator[Callable[[], None]]:
    """Count `total` steps of what is done inside; yields the function to call after each step."""
    global _current
    before = _current
    counted = _current = Snapshot(before.name, total=total)

    def advance() -> None:
        counted.done += 1

    try:
        yield advance
    finally:
        _current = before
