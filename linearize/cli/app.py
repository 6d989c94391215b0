"""Assemble the commands, and turn every failure into one line on standard error and an exit code."""

import errno
import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from linearize.checkpoint.auto import trusting_code
from linearize.cli import bench, convert, doctor, finetune, plan
from linearize.cli import eval as eval_
from linearize.cli import list as list_
from linearize.cli import run as run_
from linearize.cli import scores as scores_
from linearize.cli.output import configure, emit_json, print_error, quiet_libraries, show_traceback
from linearize.cli.reporter import reporting
from linearize.errors import (
    ConfigError,
    Interrupted,
    LinearizeError,
    ResourceError,
    is_full,
    is_out_of_memory,
    one_line,
)

FAILURE = LinearizeError.exit_code
# of names that no file can have, or that lead nowhere
BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
# objects between collections: importing torch and transformers makes a million that all stay
GC_THRESHOLD = 100_000

app = typer.Typer(
    name="linearize",
    help="Turn a pretrained causal language model into a linear-time, constant-memory one, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (convert, plan, finetune, eval_, run_, bench, scores_, list_, doctor):
    command.register(app)


def main() -> None:
    """Run the command line of this process and exit with the code of the outcome."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # a process that waits for others never runs the handler
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # of nohup
            signal.signal(signal.SIGHUP, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks ± or arrows must not cost a report
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; print what went wrong, in JSON too if it has --json."""
    gc.set_threshold(GC_THRESHOLD)
    try:
        arguments, trusted = _take_common_options([_with_home(argument) for argument in arguments])
        quiet_libraries()
        with trusting_code(trusted), reporting():
            return _run_command(arguments)
    except Exception as error:  # typer.Exit and Abort are exceptions, too
        message, code = _describe(error)
    except KeyboardInterrupt as stop:
        message, code = str(stop) or "interrupted", Interrupted.exit_code
    print_error(message if code == Interrupted.exit_code else f"error: {message}")
    if "--json" in arguments:
        emit_json({"error": message, "exit_code": code})
    return code


def _with_home(argument: str) -> str:
    """Expand ~ at the start of an argument or of an option's value, also where quotes kept the shell from it."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={_with_home(value)}"
    return os.path.expanduser(argument) if argument == "~" or argument.startswith("~/") else argument


def _take_common_options(arguments: list[str]) -> tuple[list[str], bool]:
    """Apply the options that every command takes (help.py).

    Returns:
        The other arguments, and True for --trust-remote-code.
    """
    rest: list[str] = []
    trusted = False
    options: dict[str, Any] = {}
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if argument == "--trust-remote-code":
            trusted = True
        elif argument in ("--quiet", "--verbose"):
            options[argument.removeprefix("--")] = True
        elif name == "--log-file":
            path = value if equals else next(remaining, "")
            if not path:
                raise ConfigError("--log-file: names no file")
            options["log_file"] = Path(path)
        else:
            rest.append(argument)
    configure(**options)
    return rest, trusted


def _run_command(arguments: list[str]) -> int:
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="linearize", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    if result == Interrupted.exit_code:  # typer turns an interruption into this return value
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _describe(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for a failure."""
    if isinstance(error, typer.TyperException):
        return " ".join(error.format_message().split()), ConfigError.exit_code
    if isinstance(error, typer.Abort):
        return str(error) or "interrupted", Interrupted.exit_code
    if isinstance(error, LinearizeError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return f"out of memory: {one_line(error)}".removesuffix(": "), ResourceError.exit_code
    if is_full(error):  # of any library
        return f"no space left on the disk: {one_line(error)}", ResourceError.exit_code
    if isinstance(error, ValueError) and "embedded null byte" in str(error):
        return "a name of a file has a NUL character", ConfigError.exit_code
    if isinstance(error, RecursionError):
        return "something in the input is nested too deeply", FAILURE
    if isinstance(error, OSError):
        codes = {errno.ENOMEM: ResourceError.exit_code} | dict.fromkeys(BAD_NAMES, ConfigError.exit_code)
        return str(error), codes.get(error.errno or 0, FAILURE)
    show_traceback("".join(traceback.format_exception(error)))
    return f"unforeseen {type(error).__name__}: {error} (--verbose shows where; please report it)", FAILURE


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, which CI systems, schedulers and containers send, and SIGHUP like Ctrl-C: clear up and say so."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
