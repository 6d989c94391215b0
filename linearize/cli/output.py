"""What is printed where: results to standard output, everything else to standard error."""

import json
import os
import sys
from typing import Any

from linearize.errors import ConfigError


def note(message: str) -> None:
    """A line for people, on standard error."""
    clear_progress()
    _say(message)


def _say(text: str, end: str = "\n") -> None:
    """On standard error; where nobody reads on, the work goes on all the same."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def emit(text: str) -> None:
    """Prints a result. Where nobody reads on (`| head`), the exit code still says how it went."""
    clear_progress()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit_json(value: Any) -> None:
    """The command's one JSON document."""
    emit(json.dumps(value, indent=2, ensure_ascii=False))


_open_line = False


def progress_line(message: str, *, final: bool = False) -> None:
    """One line that replaces itself on a terminal, plain lines elsewhere."""
    global _open_line
    if sys.stderr.isatty():
        _say(f"\r\x1b[2K{message}", end="\n" if final else "")
        _open_line = not final
    else:
        _say(message)


def clear_progress() -> None:
    global _open_line
    if _open_line:
        _open_line = False
        _say("")


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and advice out of the way; what matters is said by this package."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*was not found in your environment.*")


def whole_numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """The numbers of a comma-separated option, each once."""
    try:
        numbers = tuple(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise ConfigError(
            f"{option}: got '{text}', allowed are whole numbers with commas between, as 512,2048"
        ) from None
    if min(numbers) < least:
        raise ConfigError(f"{option}: got {min(numbers)}, allowed are numbers of at least {least}")
    return numbers
