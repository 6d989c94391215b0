"""`linearize list` and `linearize doctor`."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from linearize.cli.help import Command, examples
from linearize.cli.output import emit, emit_json

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


class Kind(StrEnum):
    mixers = "mixers"
    families = "families"
    recipes = "recipes"
    configs = "configs"


def register(app: typer.Typer) -> None:
    app.command(
        "list",
        cls=Command,
        epilog=examples("linearize list mixers", "linearize list families --json", "linearize list recipes"),
    )(list_)
    app.command(
        cls=Command,
        epilog=examples("linearize doctor", "linearize doctor --json", "linearize doctor --json > doctor.json"),
    )(doctor)


def list_(kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)], json_: Json = False) -> None:
    """List gated structures, model families, recipes or configs."""
    rows = _rows(kind)
    if json_:
        emit_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        rest = "; ".join(f"{key}: {value}" for key, value in row.items() if key != "name" and value not in ("", {}))
        emit(f"{row['name']:{width}}  {rest}")


def _rows(kind: Kind) -> list[dict[str, Any]]:
    if kind is Kind.mixers:
        from linearize.mixers.registry import CHOICES

        return [
            {
                "name": name,
                "summary": entry.summary,
                "mixes": ", ".join(mix for mix in entry.mixes if mix != "joint" or entry.shares_normaliser({})),
                "gates": "key, learned" if entry.has_gates({}) else "none",
                "options": entry.defaults(),
                "source": entry.source,
            }
            for name, entry in CHOICES.items()
        ]
    if kind is Kind.families:
        from linearize.families.refused import REFUSED
        from linearize.families.registry import FAMILIES

        listed = [
            {
                "name": name,
                "status": "experimental" if family.experimental else "supported",
                "why": family.experimental,
                "covers": family.covers,
            }
            for name, family in FAMILIES.items()
        ]
        refused = [{"name": name, "status": "refused", "why": why, "covers": ""} for name, why in REFUSED.items()]
        return sorted(listed, key=lambda row: row["status"], reverse=True) + refused
    from linearize.settings.loading import load_config, load_recipe, packaged

    load = load_recipe if kind is Kind.recipes else load_config
    return [
        {"name": name, "description": load(name).description, "path": str(path)}
        for name, path in packaged(kind.value).items()
    ]


def doctor(json_: Json = False) -> None:
    """Show versions, devices, kernels, disk and memory, and say what will be slow."""
    from linearize.workflows.doctor import examine

    found = examine()
    if json_:
        emit_json(found)
        return
    for section, values in found.items():
        if section != "advice":
            emit(f"{section}:")
            for key, value in values.items():
                emit(f"  {key}: {value}")
    for line in found["advice"]:
        emit(f"- {line}")
