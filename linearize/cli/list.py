"""`linearize list`."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from linearize.cli.help import Command, examples
from linearize.cli.options import Json
from linearize.cli.output import emit, emit_json


class Kind(StrEnum):
    mixers = "mixers"
    families = "families"
    recipes = "recipes"
    configs = "configs"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "list",
        cls=Command,
        epilog=examples("linearize list mixers", "linearize list families --json", "linearize list recipes"),
    )(list_)


def list_(
    kind: Annotated[Kind, typer.Argument(help="Choose the kind of things to list.", show_default=False)],
    json_: Json = False,
) -> None:
    """List mixers, model families, recipes or configs."""
    rows = _rows(kind)
    if json_:
        emit_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        facts = [f"{key}: {value}" for key, value in row.items() if key != "name" and value not in ("", {})]
        emit(f"{row['name']:{width}}  {'; '.join(facts)}")


def _rows(kind: Kind) -> list[dict[str, Any]]:
    if kind is Kind.mixers:
        return _mixer_rows()
    if kind is Kind.families:
        return _family_rows()
    from linearize.settings.config import ConversionConfig
    from linearize.settings.loading import load_config, load_recipe, packaged
    from linearize.settings.recipe import Recipe

    load: Callable[[str], Recipe | ConversionConfig] = load_recipe if kind is Kind.recipes else load_config
    files = packaged("recipes" if kind is Kind.recipes else "configs")
    return [{"name": name, "description": load(name).description, "path": str(path)} for name, path in files.items()]


def _mixer_rows() -> list[dict[str, Any]]:
    from linearize.mixers.registry import CHOICES

    rows = []
    for name, entry in CHOICES.items():
        mixes = [mix for mix in entry.mixes if mix != "joint" or entry.shares_normaliser({})]
        rows.append(
            {
                "name": name,
                "summary": entry.summary,
                "mixes": ", ".join(mixes),
                "gates": "key, learned" if entry.has_gates({}) else "none",
                "options": entry.defaults(),
                "source": entry.source,
            }
        )
    return rows


def _family_rows() -> list[dict[str, Any]]:
    """Return the supported families first, then the experimental ones, then those that conversion refuses."""
    from linearize.families.refused import REFUSED
    from linearize.families.registry import FAMILIES

    known = [
        {
            "name": name,
            "status": "experimental" if family.experimental else "supported",
            "why": family.experimental,
            "covers": family.covers,
        }
        for name, family in FAMILIES.items()
    ]
    refused = [{"name": name, "status": "refused", "why": why, "covers": ""} for name, why in REFUSED.items()]
    return sorted(known, key=lambda row: row["status"], reverse=True) + refused
