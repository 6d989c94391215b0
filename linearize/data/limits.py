"""Bound the time and the memory of a step that runs what came with a model: a chat template."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def limited(seconds: float, nbytes: int) -> Iterator[None]:
    """Stop the block after some seconds, and let it have at most so much more memory.

    Only in the main thread: signals reach no other, and the limit of memory is that of the whole process, in which the
    main thread may be training meanwhile. Systems that do not say how large a process is do not bound the memory.

    Raises:
        TimeoutError: the time is over. MemoryError: the memory is used up.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _memory_limit(nbytes):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _memory_limit(nbytes: int) -> Iterator[None]:
    """Let the process map at most `nbytes` more than it has."""
    size = _mapped_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if size is None or (soft != resource.RLIM_INFINITY and soft <= size + nbytes):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _mapped_bytes() -> int | None:
    """Return the bytes of address space of this process; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None
