"""Print results to standard output, and everything else to standard error."""

import json
import logging
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from linearize.errors import ConfigError, message_line, printable

# set before the libraries are imported, which costs seconds that a refusal should not take
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "DATASETS_VERBOSITY": "error",
}
# loggers whose advice looks like a fault of ours
NOISY = ("bitsandbytes", "datasets", "kernels", "huggingface_hub")


@dataclass
class _State:
    """The way messages are printed in this process.

    Attributes:
        quiet: print results and errors alone.
        verbose: print the libraries' messages, too.
        log: an open file that gets every message with its date.
        line_shown: a terminal shows a progress line that the next message must not overwrite.
        last_written: time.monotonic() of the last message.
        bar: the bar that a terminal shows, if any.
        log_path: the path of `log`.
    """

    quiet: bool = False
    verbose: bool = False
    log: TextIO | None = None
    line_shown: bool = False
    last_written: float = field(default_factory=time.monotonic)
    bar: "Bar | None" = None
    log_path: Path | None = None


class Bar(Protocol):
    """A bar on the terminal (cli/reporter.py)."""

    def print(self, message: str) -> None:
        """Print a message above the bar."""

    def close(self) -> None:
        """Remove the bar."""


_state = _State()
# held while something is drawn on the terminal: the bar is drawn by a thread of its own
LOCK = threading.RLock()


def configure(*, quiet: bool = False, verbose: bool = False, log_file: Path | None = None) -> None:
    """Set how this process prints messages.

    Raises:
        ConfigError: the log file cannot be written.
    """
    global _state
    if _state.log is not None:
        _state.log.close()
    try:
        log = None if log_file is None else _open_log(log_file.expanduser())
    except OSError as error:
        raise ConfigError(f"--log-file: cannot write '{log_file}' ({error.strerror})") from None
    _state = _State(quiet, verbose, log, log_path=None if log_file is None else log_file.expanduser().absolute())


def _open_log(path: Path) -> TextIO:
    """Open a log file, which stays open as long as the process; a pipe that nobody reads is an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    return open(descriptor, "a", encoding="utf-8", buffering=1)


def open_files() -> list[Path]:
    """Return the files that this process writes messages to."""
    return [] if _state.log_path is None else [_state.log_path]


def is_quiet() -> bool:
    """Return True if only results and errors are printed."""
    return _state.quiet


def last_written() -> float:
    """Return time.monotonic() of the last message."""
    return _state.last_written


def shows_line() -> bool:
    """Return True while a terminal shows a progress line."""
    return _state.line_shown


def bar() -> Bar | None:
    """Return the bar that the terminal shows."""
    return _state.bar


def set_bar(shown: Bar) -> None:
    """Print messages above this bar from now on."""
    _state.bar = shown


def close_bar() -> None:
    """Remove the bar, if there is one."""
    with LOCK:
        if _state.bar is not None:
            _state.bar.close()
            _state.bar = None


def emit(text: str) -> None:
    """Print a result. If it cannot be (`| head`, a full disk), go on, so that the exit code stays right."""
    close_bar()
    clear_progress()
    _state.last_written = time.monotonic()
    try:
        print(printable(text, keep="\n\t"), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the work is done all the same
            print_error(f"the results could not be printed: standard output: {error.strerror}")


def emit_json(value: Any) -> None:
    """Print `value` as the command's one JSON document."""
    emit(json.dumps(value, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """Print a message for people, on standard error; with the date where that is no terminal."""
    message = message_line(message)
    _log(message)
    if _state.quiet:
        return
    with LOCK:
        clear_progress()
        _state.last_written = time.monotonic()
        if _state.bar is not None:
            _state.bar.print(message)
        else:
            _print_error(message if sys.stderr.isatty() else f"{_now()} {message}")


def print_error(message: str) -> None:
    """Print an error on standard error."""
    message = message_line(message)
    _log(message)
    close_bar()
    clear_progress()
    _print_error(message)


def show_traceback(text: str) -> None:
    """Write the traceback of an unforeseen failure to the log file, and on standard error if that is wanted."""
    _log(text)
    if _state.verbose:
        close_bar()
        _print_error(printable(text, keep="\n\t"))


def progress_line(message: str, *, final: bool = False) -> None:
    """Print progress: on a terminal a line that the next one replaces, elsewhere a line of its own."""
    message = message_line(message)
    _log(message)
    if _state.quiet:
        return
    close_bar()
    _state.last_written = time.monotonic()
    if sys.stderr.isatty():
        _print_error(f"\r\x1b[2K{message}", end="\n" if final else "")
        _state.line_shown = not final
    else:
        _print_error(f"{_now()} {message}")


def clear_progress() -> None:
    """End the progress line, if a terminal shows one."""
    if _state.line_shown:
        _state.line_shown = False
        _print_error("")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _log(message: str) -> None:
    """Append a message to the log file, if there is one."""
    if _state.log is not None:
        try:
            _state.log.write(f"{_now()} {message}\n")
        except OSError as error:  # the work goes on without it
            _state.log = None
            _print_error(f"the log file cannot be written any more: {error.strerror}")


def _print_error(text: str, end: str = "\n") -> None:
    """Print on standard error. If its reader is gone, go on with the work and print nowhere."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def quiet_libraries() -> None:
    """Silence the progress bars and advice of transformers and the hub's client, unless the user asks for them."""
    if _state.verbose:
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*was not found in your environment.*")
