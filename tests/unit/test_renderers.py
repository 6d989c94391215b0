"""Renderers: tables, plots, pages and the model card from results made by hand."""

import json
import math

import pytest
from helpers import results_of

from linearize.plan import NO_BRANCH, LayerPlan
from linearize.report import card
from linearize.report.markdown import summary_table
from linearize.report.pictures import plots_of
from linearize.report.plots import svg
from linearize.report.results import BASE, STUDENT, WINDOW, make_metric

BRANCH = LayerPlan((), "gla", window=64, sinks=4, mix="sum")
WINDOW_ALONE = LayerPlan((), NO_BRANCH, window=128, sinks=2, mix=NO_BRANCH)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([WINDOW_ALONE, WINDOW_ALONE], "a window of 128 keys and 2 sinks"),
        (
            [BRANCH, WINDOW_ALONE],
            "a window of 64 keys, 4 sinks and a recurrent branch (gla, mixed by `sum`); "
            "elsewhere a window of 128 keys and 2 sinks",
        ),
        ([], "nothing"),
    ],
    ids=["window", "branch", "nothing"],
)
def test_the_card_says_what_stands_in_place_of_softmax(layers, words):
    assert card._replacement(layers) == words


# every unit the same, all of them nothing, and a single one
FLAT = make_metric("recall@8", "higher", {name: [0.5, 0.5, 0.5] for name in (BASE, STUDENT, WINDOW)})
ZERO = make_metric("recall@16", "higher", {name: [0.0] * 3 for name in (BASE, STUDENT, WINDOW)}, items=True)
SINGLE = make_metric("perplexity@8", "lower", {BASE: [1.0], STUDENT: [1.5], WINDOW: [2.0]}, exponentiate=True)


@pytest.fixture(scope="module")
def results():
    return results_of(FLAT, ZERO, SINGLE)


def test_figures_without_a_spread_have_no_error_and_no_recovery():
    assert FLAT.values[STUDENT].error == 0 and FLAT.p_value == 1.0 and FLAT.recovery is None


def test_figures_of_zero_have_no_ratio():
    assert ZERO.ratio[STUDENT] is None and ZERO.p_value == 1.0


def test_a_single_unit_has_neither_error_nor_p_value():
    assert SINGLE.p_value is None and math.isnan(SINGLE.values[BASE].error)


def test_an_error_that_is_not_a_number_becomes_null(results):
    document = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert document["metrics"][2]["values"]["base"]["error"] is None


@pytest.mark.parametrize("cell", ["| recall@8 ↑ | 0.500 ± 0.000 |", "| recall@16 ↑ | 0.000 ± 0.000 |", "4.482 ± –"])
def test_the_summary_shows_figures_without_a_spread(results, cell):
    assert cell in summary_table(results)


def test_plots_are_drawn_of_figures_without_a_spread(results):
    assert all(svg(plot).startswith("<svg") for plot in plots_of(results))
