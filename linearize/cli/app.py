"""The command line: one thin file a command, and one place where failures become exit codes."""

import errno
import gc
import os
import signal
import sys
import traceback

import typer

from linearize.cli import bench, convert, finetune, info
from linearize.cli import eval as evaluation
from linearize.cli import run as pipeline
from linearize.cli.output import emit_json, note
from linearize.errors import Interrupted, LinearizeError, ResourceError

# click's ClickException: typer carries a copy of click in new versions (there TyperException) and uses the package in old ones
UsageFailure = typer.BadParameter.__mro__[-4]

app = typer.Typer(
    name="linearize",
    help="Turn a pretrained causal language model into a linear-time, constant-memory one, and measure what it kept.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
convert.register(app)
finetune.register(app)
evaluation.register(app)
pipeline.register(app)
bench.register(app)
info.register(app)


def main() -> None:
    """Runs the command line and exits with the code that the outcome asks for."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # a process that waits for others does not get to hear of it
        signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):  # a terminal without ± or arrows must not cost a report
        stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    wants_json = "--json" in arguments
    gc.set_threshold(100_000)  # importing torch and transformers makes a million objects that all stay
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="linearize", standalone_mode=False)
        if result == Interrupted.exit_code:  # typer has swallowed the interruption
            return _fail("interrupted", Interrupted.exit_code, wants_json)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except UsageFailure as error:
        return _fail(" ".join(error.format_message().split()), 2, wants_json)
    except (KeyboardInterrupt, typer.Abort) as stop:
        return _fail(str(stop) or "interrupted", Interrupted.exit_code, wants_json)
    except LinearizeError as error:
        return _fail(str(error), error.exit_code, wants_json)
    except MemoryError:
        return _fail("out of memory", ResourceError.exit_code, wants_json)
    except OSError as error:
        code = ResourceError.exit_code if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM) else 1
        return _fail(str(error), code, wants_json)
    except Exception as error:
        if _out_of_memory(error):
            return _fail(f"out of memory: {str(error).splitlines()[0]}", ResourceError.exit_code, wants_json)
        traceback.print_exc()
        return _fail(f"unforeseen {type(error).__name__}: {error}", 1, wants_json)


def _terminated(number: int, frame: object) -> None:
    """What CI systems, schedulers and containers stop a command with; as Ctrl-C, so that it clears up and says so."""
    raise KeyboardInterrupt


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _fail(message: str, code: int, wants_json: bool) -> int:
    note(f"error: {message}" if code != Interrupted.exit_code else message)
    if wants_json:
        emit_json({"error": message, "exit_code": code})
    return code


if __name__ == "__main__":
    main()
