"""Format help as plain text, with the options under panels.

Typer's rich output takes a quarter of a second to load.
"""

from typing import TYPE_CHECKING

from typer.core import TyperCommand

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

EXIT_CODES = (
    "Exit codes: 0 done, 1 failure, 2 usage or configuration, 3 quality gate failed, 4 unsupported model, "
    "5 out of memory or disk, 130 interrupted."
)


# options that every command takes (cli/app.py)
EVERY_COMMAND = {
    "Messages": [
        ("--quiet", "Print results and errors alone."),
        ("--verbose", "Print the libraries' messages and progress bars, too."),
        ("--log-file PATH", "Append every message to this file, with its date."),
    ],
    "Trust": [
        ("--trust-remote-code", "Run the code that a tokenizer brings. Code of models is never run."),
    ],
}


class Command(TyperCommand):
    """Show each option under its `rich_help_panel`, and keep the line breaks of the epilog."""

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the arguments and options, panel by panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, options in EVERY_COMMAND.items():
            panels.setdefault(title, []).extend(options)
        for title in sorted(panels, key=lambda title: title == "Options"):  # Options, which holds --help, goes last
            with formatter.section(title):
                formatter.write_dl(panels[title])

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the examples and the exit codes."""
        formatter.write("\n" + (self.epilog or "") + "\n\n")
        formatter.write_text(EXIT_CODES)


def examples(*commands: str) -> str:
    """Return a command's epilog, which shows `commands`."""
    return "\n".join(["Examples:", *(f"  {command}" for command in commands)])
