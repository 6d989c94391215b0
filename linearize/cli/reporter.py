"""Show that a long command is at work: a bar on a terminal, a dated line every half minute elsewhere.

A thread looks at the computation that is under way (linearize/progress.py). Whatever a command does, a terminal is
never silent for more than a few seconds, nor a log for more than thirty.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from linearize.cli import output
from linearize.errors import message_line
from linearize.progress import Snapshot, snapshot

# seconds of silence before a command shows that it is at work: on a terminal, and in a log
TERMINAL_SILENCE, LOG_SILENCE = 2.0, 25.0
# seconds between two looks
TICK = 0.5


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Show progress on standard error while the block runs."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(done: threading.Event) -> None:
    """Look at the computation until `done` is set."""
    bar = None
    while not done.wait(TICK):
        silence = time.monotonic() - output.last_written()
        if output.is_quiet():
            continue
        if not sys.stderr.isatty():
            if silence > LOG_SILENCE:
                output.note(describe(snapshot()))
            continue
        with output.LOCK:
            if output.bar() is None and silence > TERMINAL_SILENCE and not output.shows_line():
                bar = _Bar()
                output.set_bar(bar)
            if bar is not None and output.bar() is bar:
                bar.show(snapshot())
    output.close_bar()


def describe(now: Snapshot) -> str:
    """Say what is under way: its steps, the time it took and will take, and memory."""
    parts = [now.name or "working"]
    if now.total:
        parts.append(f"{now.done} of {now.total}")
    parts.append(f"{_clock(now.seconds)} so far")
    if now.seconds_left is not None:
        parts.append(f"{_clock(now.seconds_left)} left")
    return ", ".join([*parts, f"{_memory() / 2**30:.1f} GiB"])


class _Bar:
    """The bar of rich, which takes a quarter of a second to import."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task: Any = None
        self.started = 0.0
        self.progress.start()

    def show(self, now: Snapshot) -> None:
        """Draw what is under way."""
        from rich.markup import escape

        if self.task is None or now.started != self.started:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(
                escape(message_line(now.name or "working", 60)), total=now.total or None, count="", left=""
            )
            self.started = now.started
        left = "" if now.seconds_left is None else f"{_clock(now.seconds_left)} left, "
        count = f"{now.done} of {now.total}" if now.total else ""
        memory = f"{_memory() / 2**30:.1f} GiB"
        self.progress.update(self.task, completed=now.done, count=count, left=f"{left}{memory}")

    def print(self, message: str) -> None:
        """Print a message above the bar."""
        self.progress.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        self.progress.stop()


def _memory() -> int:
    """Return the bytes of memory that this process has resident; where the system does not say, its maximum."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _clock(seconds: float) -> str:
    """Format a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
