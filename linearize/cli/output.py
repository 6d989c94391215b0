"""Print results to standard output, and everything else to standard error."""

import json
import os
import sys
import warnings
from typing import Any

# set before the libraries are imported, which costs seconds that a refusal should not take
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
# True while a terminal shows a progress line that the next message must not overwrite
_progress_shown = False


def emit(text: str) -> None:
    """Print a result. If the reader has closed the pipe (`| head`), go on, so that the exit code stays right."""
    clear_progress()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit_json(value: Any) -> None:
    """Print `value` as the command's one JSON document."""
    emit(json.dumps(value, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """Print a message for people, on standard error."""
    clear_progress()
    _print_error(message)


def progress_line(message: str, *, final: bool = False) -> None:
    """Print progress: on a terminal a line that the next one replaces, elsewhere a line of its own."""
    global _progress_shown
    if sys.stderr.isatty():
        _print_error(f"\r\x1b[2K{message}", end="\n" if final else "")
        _progress_shown = not final
    else:
        _print_error(message)


def clear_progress() -> None:
    """End the progress line, if a terminal shows one."""
    global _progress_shown
    if _progress_shown:
        _progress_shown = False
        _print_error("")


def _print_error(text: str, end: str = "\n") -> None:
    """Print on standard error. If its reader is gone, go on with the work and print nowhere."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def quiet_libraries() -> None:
    """Silence the progress bars and advice of transformers and the hub's client, unless the user asks for them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*was not found in your environment.*")
