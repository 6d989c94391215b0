"""Gates: which conditions hold, and which cannot be read."""

import pytest
from helpers import results_of

from linearize.errors import ConfigError
from linearize.report.comparison import OlderMetric, OlderResults, regression_gates
from linearize.report.gates import evaluate_gates, parse_gate, recovery_gates
from linearize.report.results import BASE, SCHEMA_VERSION, STUDENT, WINDOW, Value, make_metric


@pytest.mark.parametrize(
    ("expression", "passed"),
    [
        ("perplexity@8.ratio<=1.7", True),
        ("perplexity@8.ratio<1.6", False),
        ("perplexity@8>=7", True),
        ("perplexity@8.base<=4.5", True),
        ("perplexity@8.recovery>=0.5", True),
        ("perplexity@8.recovery>0.51", False),
        ("recall@8.ratio>=0.1", False),  # the base recalls nothing, so there is no ratio
        ("recall@8.untrained>=0", False),  # not measured
    ],
)
def test_a_gate_passes_where_its_condition_holds(expression, passed):
    metrics = (
        make_metric(
            "perplexity@8", "lower", {BASE: [1.5] * 2, STUDENT: [2.0] * 2, WINDOW: [2.5] * 2}, exponentiate=True
        ),
        make_metric("recall@8", "higher", {BASE: [0.0], STUDENT: [0.5]}),
    )
    assert evaluate_gates([expression], metrics)[0].passed == passed


@pytest.mark.parametrize("text", ["perplexity", "x>=", ">=3", "x==3", "x>=y", "perplexity@8.ratoi<=1", "x.base=<3"])
def test_a_malformed_gate_is_refused(text):
    with pytest.raises(ConfigError, match="--gate"):
        parse_gate(text)


def losses_of(student: float, window: float) -> dict[str, list[float]]:
    """Return four losses of three models: `student` and `window` are how far they lie above the base's."""
    shifts = {BASE: 0.0, STUDENT: student, WINDOW: window}
    return {
        name: [loss + shift + (0.02 * (-1) ** i if shift else 0.0) for i, loss in enumerate([1.0, 1.2, 0.9, 1.1])]
        for name, shift in shifts.items()
    }


@pytest.mark.parametrize(
    ("student", "window", "passed"),
    [
        (0.05, 0.4, True),  # most of what the window loses is there again
        (0.3, 0.4, False),
        (0.0, 0.0, True),  # nothing to recover, nothing lost
        (0.3, 0.0, False),
        (-0.3, 0.0, True),
    ],
)
def test_min_recovery_asks_for_a_share_of_the_loss_where_there_is_one(student, window, passed):
    metric = make_metric("perplexity@64", "lower", losses_of(student, window), exponentiate=True)
    (gate,) = recovery_gates(0.5, [64], (metric,))
    assert gate.passed == passed


def test_min_recovery_is_not_met_by_a_single_unit():
    losses = {name: units[:1] for name, units in losses_of(0.0, 0.0).items()}
    alone = make_metric("perplexity@64", "lower", losses, exponentiate=True)
    assert not recovery_gates(0.5, [64], (alone,))[0].passed


def test_min_recovery_is_not_met_at_a_length_that_was_not_measured():
    metric = make_metric("perplexity@64", "lower", losses_of(0.0, 0.0), exponentiate=True)
    assert not recovery_gates(0.5, [32], (metric,))[0].passed


LOSSES = [1.0 + 3.0 * i / 11 for i in range(12)]  # texts differ far more than students do


def student_behind(distance: float):
    """Return results of a student that lies `distance` behind its base on every text, but for a little noise."""
    student = [loss + distance + 0.001 * (i % 3) for i, loss in enumerate(LOSSES)]
    units = {BASE: LOSSES, STUDENT: student, WINDOW: LOSSES}
    return results_of(make_metric("perplexity@8", "lower", units, exponentiate=True))


def as_older(results) -> OlderResults:
    """Return results as they are read from an older results.json."""
    metrics = {
        metric.name: OlderMetric(metric.values[STUDENT], metric.values[BASE], metric.difference, data="")
        for metric in results.metrics
    }
    return OlderResults("older.json", SCHEMA_VERSION, results.data, metrics)


@pytest.mark.parametrize(("old", "new", "passed"), [(0.01, 0.01, True), (0.05, 0.01, True), (0.01, 0.05, False)])
def test_a_regression_is_counted_from_the_base(old, new, passed):
    """Two students of one base on one text: what they share with it is no noise between them."""
    (gate,) = regression_gates(as_older(student_behind(old)), student_behind(new))[0]
    assert gate.passed is passed and "further behind the base" in gate.expression


def test_a_regression_can_be_smaller_than_the_error_of_either_student():
    near, far = (student_behind(distance).metrics[0].values[STUDENT] for distance in (0.01, 0.05))
    assert far.error > abs(far.mean - near.mean)


@pytest.mark.parametrize(("before", "passed"), [(0.5, True), (0.51, False)])
def test_a_regression_of_figures_without_a_spread_is_any_step_down(before, passed):
    flat = make_metric("recall@8", "higher", {name: [0.5, 0.5, 0.5] for name in (BASE, STUDENT, WINDOW)})
    results = results_of(flat)
    metric = OlderMetric(value=Value(before, 0.0, 3), base=None, difference=None, data="")
    older = OlderResults("older.json", SCHEMA_VERSION, results.data, {"recall@8": metric})
    assert [gate.passed for gate in regression_gates(older, results)[0]] == [passed]
