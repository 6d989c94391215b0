"""Odd environments: what is closed, full, missing, limited, nonsense, or stops the process."""

import contextlib
import os
import resource
import signal
import tempfile
from collections.abc import Callable

Prepare = Callable[[], None]


def _variables(**values: str | None) -> Prepare:
    """Set environment variables, or take them away."""

    def prepare() -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None

    return prepare


def _limit(kind: int, value: int) -> Prepare:
    return lambda: resource.setrlimit(kind, (value, value))


def _closed(*descriptors: int) -> Prepare:
    def prepare() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return prepare


def _full(descriptor: int) -> Prepare:
    return lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor) and None


def _stopped(number: int, seconds: float) -> Prepare:
    """Send a signal to the process after a while."""

    def prepare() -> None:
        from linearize.cli import app

        signal.signal(signal.SIGTERM, app._interrupt)
        signal.signal(signal.SIGHUP, app._interrupt)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = os.getpid()
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGVTALRM, lambda *_: os.kill(process, number))
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)

    return prepare


ENVIRONMENTS: dict[str, Prepare] = {
    "no home": _variables(HOME=None, XDG_CACHE_HOME=None),
    "home is nowhere": _variables(HOME="/nonexistent", XDG_CACHE_HOME=None),
    "cache is a file": _variables(XDG_CACHE_HOME="/dev/null"),
    "temporary folder is nowhere": _variables(TMPDIR="/nonexistent"),
    "no path": _variables(PATH=""),
    "locale C": _variables(LC_ALL="C", LANG="C"),
    "narrow terminal": _variables(COLUMNS="10"),
    "columns are no number": _variables(COLUMNS="x"),
    "endpoint is nonsense": _variables(HF_ENDPOINT="nonsense", HF_HUB_OFFLINE="0"),
    "hub cache is a file": _variables(HF_HOME="/dev/null"),
    "no colour": _variables(NO_COLOR="1", CI="true"),
    "output closed": _closed(1),
    "errors closed": _closed(2),
    "all closed": _closed(0, 1, 2),
    "output full": _full(1),
    "errors full": _full(2),
    "files of 4 KiB": _limit(resource.RLIMIT_FSIZE, 4096),
    "files of 100 kB": _limit(resource.RLIMIT_FSIZE, 100_000),
    "20 open files": _limit(resource.RLIMIT_NOFILE, 20),
    **{
        f"{signal.Signals(number).name} after {seconds} s": _stopped(number, seconds)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for seconds in (0.05, 0.3, 1.0, 2.0)
    },
}
