"""Share options between commands, and parse the ones that hold lists."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.output import note
from linearize.errors import ConfigError, nearest

# the panels of --help that several commands have
ATTENTION, OUTPUT, SOURCE = "Attention", "Output", "Source"

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=OUTPUT)]


def whole_numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """Parse a comma-separated list of whole numbers of at least `least`; a repeated number counts once.

    Raises:
        ConfigError: an item that is no whole number, or too small.
    """
    try:
        numbers = tuple(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise ConfigError(
            f"{option}: got '{text}', allowed are whole numbers with commas between, as 512,2048"
        ) from None
    if min(numbers) < least:
        raise ConfigError(f"{option}: got {min(numbers)}, allowed are numbers of at least {least}")
    return numbers


def known_names(option: str, text: str, allowed: Collection[str]) -> list[str]:
    """Parse a comma-separated list of names.

    Raises:
        ConfigError: a name that is not in `allowed`.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{option}: got '{name}', allowed are {', '.join(allowed)}{nearest(name, allowed)}")
    return names


def model_or_newest(model: Path | None, newest: Callable[[], Path], kind: str) -> Path:
    """Return MODEL or, if it was left out, the `newest` folder under ./linearized/, after telling the user which."""
    if model is not None:
        return model
    folder = newest()
    note(f"MODEL: {folder} (the newest {kind})")
    return folder
