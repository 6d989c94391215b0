"""Help in plain text, options grouped by panel. (Typer's rich rendering takes a quarter of a second to load.)"""

from typer.core import TyperCommand

EXIT_CODES = (
    "Exit codes: 0 done, 1 failure, 2 usage or configuration, 3 quality gate failed, 4 unsupported model, "
    "5 out of memory or disk, 130 interrupted."
)


class Command(TyperCommand):
    """A command whose options appear under their `rich_help_panel` and whose epilog keeps its lines."""

    def format_options(self, ctx, formatter) -> None:
        groups: dict[str, list] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(parameter.rich_help_panel or default, []).append(record)
        for title in sorted(groups, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(groups[title])

    def format_epilog(self, ctx, formatter) -> None:
        formatter.write("\n" + (self.epilog or "") + "\n\n")
        formatter.write_text(EXIT_CODES)


def examples(*commands: str) -> str:
    """The epilog of a command."""
    return "\n".join(["Examples:", *(f"  {command}" for command in commands)])
