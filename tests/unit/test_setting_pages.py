"""The pages of recipes and configs: every key of the schema with its default, and every file of the folder."""

import re

import pytest
from helpers import ROOT

from linearize.settings.loading import load_config, packaged
from linearize.settings.recipe import Recipe, Stage
from linearize.settings.yaml_file import parse_value

PAGES = ("recipes", "configs")


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of the tables below a heading, the other cells by the first one's name."""
    text = (ROOT / page / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^|]+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows}


def flat(settings: dict, groups: tuple[str, ...]) -> dict[str, object]:
    """Return settings by dotted key, where `groups` hold keys of their own."""
    plain = {key: value for key, value in settings.items() if key not in groups}
    return plain | {f"{group}.{key}": value for group in groups for key, value in settings[group].items()}


def defaults(page: str) -> dict[str, object]:
    if page == "configs":
        return flat(load_config(None).model_dump(mode="json"), ("scoring", "calibration", "quality"))
    keys = flat(Recipe().model_dump(mode="json"), ("loss", "lora", "optimizer"))
    own = Stage.model_fields.keys() - Recipe.model_fields.keys()
    stage = Stage(name="distill").model_dump(mode="json", include=own - {"name"})
    return {**keys, "stages[].name": "required", **{f"stages[].{key}": value for key, value in stage.items()}}


@pytest.mark.parametrize("page", PAGES)
def test_every_key_stands_on_its_page_with_its_default(page):
    shown = {key: parse_value(cells[0].strip("`")) for key, cells in rows_of(page, "All keys").items()}
    assert shown == defaults(page)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_stands_on_its_page(page):
    heading = f"The {page}"
    assert rows_of(page, heading).keys() == packaged(page).keys()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page):
    assert len((ROOT / page / "README.md").read_text(encoding="utf-8").splitlines()) < 120
