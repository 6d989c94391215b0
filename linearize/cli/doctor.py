"""`linearize doctor`."""

import typer

from linearize.cli.help import Command, examples
from linearize.cli.options import Json
from linearize.cli.output import emit, emit_json


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=Command,
        epilog=examples("linearize doctor", "linearize doctor --json", "linearize doctor --json > doctor.json"),
    )(doctor)


def doctor(json_: Json = False) -> None:
    """Show versions, devices, kernels, disk and memory, and say what will be slow."""
    from linearize.workflows.doctor import examine

    report = examine()
    if json_:
        emit_json(report)
        return
    advice = report.pop("advice")
    for section, facts in report.items():
        emit(f"{section}:")
        for name, value in facts.items():
            emit(f"  {name}: {value}")
    for line in advice:
        emit(f"- {line}")
