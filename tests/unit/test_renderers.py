"""Renderers: tables, plots, pages and the model card from results made by hand."""

import json
import math
from dataclasses import replace

from helpers import SUITE, quiet

from linearize.plan import NO_BRANCH
from linearize.report import card
from linearize.report.gates import regression_gates
from linearize.report.markdown import summary_table
from linearize.report.plots import plots_of, svg
from linearize.report.results import BASE, STUDENT, WINDOW, make_metric
from linearize.workflows.evaluate import evaluate


def test_the_card_says_what_stands_in_place_of_softmax():
    branch = {"window": 64, "sinks": 4, "mixer": "gla", "mix": "sum"}
    alone = {"window": 128, "sinks": 2, "mixer": NO_BRANCH, "mix": NO_BRANCH}
    assert card._replacement([alone, alone]) == "a window of 128 keys and 2 sinks"
    assert card._replacement([branch, alone]) == (
        "a window of 64 keys, 4 sinks and a recurrent branch (gla, mixed by `sum`); "
        "elsewhere a window of 128 keys and 2 sinks"
    )
    assert card._replacement([]) == "nothing"


def test_figures_without_a_spread(converted):
    """Every unit the same, or a single one: figures, tables, pictures and comparisons say so instead of failing."""
    flat = make_metric("recall@8", "higher", {name: [0.5, 0.5, 0.5] for name in (BASE, STUDENT, WINDOW)})
    zero = make_metric("recall@16", "higher", {name: [0.0] * 3 for name in (BASE, STUDENT, WINDOW)}, items=True)
    single = make_metric("perplexity@8", "lower", {BASE: [1.0], STUDENT: [1.5], WINDOW: [2.0]}, exponentiate=True)
    assert flat.values[STUDENT].error == 0 and flat.p_value == 1.0 and flat.recovery is None
    assert zero.ratio[STUDENT] is None and zero.p_value == 1.0
    assert single.p_value is None and math.isnan(single.values[BASE].error)
    results = evaluate(converted, replace(SUITE, lengths=(32,), recall=(), max_tokens=32), progress=quiet)
    results = replace(results, metrics=(flat, zero, single))
    document = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert document["metrics"][2]["values"]["base"]["error"] is None
    assert "| recall@8 ↑ | 0.500 ± 0.000 |" in summary_table(results)
    assert "| recall@16 ↑ | 0.000 ± 0.000 |" in summary_table(results)
    assert "4.482 ± –" in summary_table(results)
    for plot in plots_of(results):
        assert svg(plot).startswith("<svg")
    figure = {"better": "higher", "value": {"mean": 0.5, "error": 0.0}, "base": None, "difference": None, "data": ""}
    older = {"metrics": {"recall@8": figure}}
    older |= {"data": results.data, "version": 3, "path": "older.json"}
    assert [gate.passed for gate in regression_gates(older, results)[0]] == [True]
    older["metrics"]["recall@8"]["value"]["mean"] = 0.51
    assert [gate.passed for gate in regression_gates(older, results)[0]] == [False]
