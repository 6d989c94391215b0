"""Gates: which conditions hold, and which cannot be read."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import SUITE, quiet

from linearize.errors import ConfigError
from linearize.report.gates import evaluate_gates, parse_gate, recovery_gates, regression_gates
from linearize.report.results import BASE, SCHEMA_VERSION, STUDENT, WINDOW, make_metric
from linearize.workflows.evaluate import evaluate


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
def test_gates(expression, passed):
    metrics = (
        make_metric(
            "perplexity@8", "lower", {BASE: [1.5] * 2, STUDENT: [2.0] * 2, WINDOW: [2.5] * 2}, exponentiate=True
        ),
        make_metric("recall@8", "higher", {BASE: [0.0], STUDENT: [0.5]}),
    )
    assert evaluate_gates([expression], metrics)[0].passed == passed


@pytest.mark.parametrize("text", ["perplexity", "x>=", ">=3", "x==3", "x>=y", "perplexity@8.ratoi<=1", "x.base=<3"])
def test_malformed_gates(text):
    with pytest.raises(ConfigError, match="--gate"):
        parse_gate(text)


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
def test_what_min_recovery_asks(student, window, passed):
    base = [1.0, 1.2, 0.9, 1.1]
    shifts = {BASE: 0.0, STUDENT: student, WINDOW: window}
    losses = {
        name: [x + shift + (0.02 * (-1) ** i if shift else 0.0) for i, x in enumerate(base)]
        for name, shift in shifts.items()
    }
    metric = make_metric("perplexity@64", "lower", losses, exponentiate=True)
    (gate,) = recovery_gates(0.5, [64], (metric,))
    assert gate.passed == passed
    alone = make_metric("perplexity@64", "lower", {name: x[:1] for name, x in losses.items()}, exponentiate=True)
    assert not recovery_gates(0.5, [64], (alone,))[0].passed and not recovery_gates(0.5, [32], (metric,))[0].passed


def test_a_regression_is_counted_from_the_base(converted):
    """Two students of one base on one text: what they share with it is no noise between them."""
    losses = torch.linspace(1.0, 4.0, 12).tolist()  # texts differ far more than students do

    def report(behind):
        student = [loss + behind + 0.001 * (i % 3) for i, loss in enumerate(losses)]
        return make_metric("perplexity@8", "lower", {BASE: losses, STUDENT: student, WINDOW: losses}, exponentiate=True)

    results = evaluate(converted, replace(SUITE, lengths=(32,), recall=(), max_tokens=32), progress=quiet)
    documents = {behind: replace(results, metrics=(report(behind),)) for behind in (0.01, 0.05)}
    for old, new, passed in ((0.01, 0.01, True), (0.05, 0.01, True), (0.01, 0.05, False)):
        document = json.loads(json.dumps(documents[old].to_dict(), allow_nan=False))
        older = {"data": results.data, "version": SCHEMA_VERSION, "path": "older.json", "metrics": {}}
        for item in document["metrics"]:
            values = {"value": item["values"][STUDENT], "base": item["values"][BASE]}
            older["metrics"][item["name"]] = {**values, "difference": item["difference"], "data": ""}
        (gate,) = regression_gates(older, documents[new])[0]
        assert gate.passed is passed and "further behind the base" in gate.expression
        error = documents[new].metrics[0].values[STUDENT].error
        assert error > abs(
            documents[0.05].metrics[0].values[STUDENT].mean - documents[0.01].metrics[0].values[STUDENT].mean
        )
