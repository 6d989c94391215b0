"""Statistics of a report: errors, tests of pairs, recovery and chance."""

import math

import pytest

from linearize.report.results import BASE, STUDENT, WINDOW, make_metric, mean_and_error
from linearize.report.statistics import bootstrap_error, mcnemar, sign_flip_test, student_quantile


def test_bootstrap_and_paired_tests():
    values = [float((7 * i) % 11) for i in range(200)]
    mean = sum(values) / 200
    classical = math.sqrt(sum((v - mean) ** 2 for v in values) / 199 / 200)
    assert bootstrap_error(values) == pytest.approx(classical, rel=0.1)
    assert bootstrap_error([0.0, 2.0]) == pytest.approx(1.0, rel=0.1)  # and so for few
    assert bootstrap_error(values) == bootstrap_error(values)
    assert sign_flip_test([0.0] * 5) == 1.0 and sign_flip_test([1.0]) is None
    # of 16 choices of signs two are as far from 0, and of 4 that many
    assert sign_flip_test([1.0, 1.1, 0.9, 1.2]) == 2 / 16 and sign_flip_test([1.0, 1.1]) == 2 / 4
    assert sign_flip_test([1.0, -1.1, 0.9, -0.8]) == 1  # their sum is 0
    many = [0.3 + math.sin(i) for i in range(60)]
    normal = math.erfc(math.sqrt(60) * 0.3 / (0.7071 * math.sqrt(2)))
    assert sign_flip_test(many) == sign_flip_test(many) and sign_flip_test(many) == pytest.approx(normal, abs=0.005)
    # tables of Student's t
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (60, 2.000)):
        assert student_quantile(freedom) == pytest.approx(quantile, abs=0.01)
    # 1 against 9 discordant items: 2 (C(10,0) + C(10,1)) / 2^10
    assert mcnemar([1.0] + [0.0] * 9 + [1.0] * 4, [0.0] + [1.0] * 9 + [1.0] * 4) == pytest.approx(22 / 1024)
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0


def test_recovery_needs_a_loss_that_stands_out():
    losses = {BASE: [1.0, 1.2, 0.9, 1.1], STUDENT: [1.1, 1.3, 1.0, 1.2]}
    for window, recovery in (([1.2, 1.41, 1.09, 1.3], 0.5), ([1.0, 1.2, 1.5, 1.3], None)):
        metric = make_metric("perplexity@64", "lower", {**losses, WINDOW: window})
        assert metric.recovery == (recovery if recovery is None else pytest.approx(recovery, abs=0.01))
    alone = {name: values[:1] for name, values in {**losses, WINDOW: [9.0]}.items()}
    assert make_metric("perplexity@64", "lower", alone).recovery is None


def test_chance():
    units = {BASE: [1.0, 1.0, 1.0, 0.0], STUDENT: [1.0, 1.0, 0.0, 0.0]}
    metric = make_metric("arc_acc", "higher", units, chance=0.25, items=True)
    assert metric.recovery_over_chance == pytest.approx(0.5) and metric.p_value == 1.0


def test_errors_ratios_recovery_and_pairs():
    spread = [float(i % 7) for i in range(50)]
    classical = (sum((x - 2.92) ** 2 for x in spread) / 49 / 50) ** 0.5
    assert mean_and_error(spread).error == pytest.approx(classical, rel=0.1)
    assert math.isnan(mean_and_error([1.0]).error)
    units = {BASE: [1.0, 2.0], STUDENT: [1.5, 2.5], WINDOW: [2.0, 3.0]}
    metric = make_metric("perplexity@8", "lower", units, exponentiate=True)
    assert metric.values[BASE].mean == pytest.approx(math.exp(1.5))
    assert metric.ratio[STUDENT] == pytest.approx(math.exp(0.5))
    assert metric.recovery == pytest.approx(0.5)
    assert (metric.difference.mean, metric.difference.error) == (pytest.approx(0.5), pytest.approx(0.0))
    # window + sinks is worse than the base by less than its noise: nothing can be recovered
    noisy = {BASE: [1.0, 2.0, 3.0], STUDENT: [1.0, 2.0, 3.0], WINDOW: [3.0, 1.0, 3.1]}
    assert make_metric("perplexity@8", "lower", noisy).recovery is None
    better = {BASE: [0.5, 0.5], STUDENT: [0.4, 0.4], WINDOW: [0.9, 0.9]}
    assert make_metric("recall@8", "higher", better).recovery is None
    flat = make_metric("recall@8", "higher", {BASE: [0.0], STUDENT: [0.0], WINDOW: [0.0]})
    assert flat.recovery is None and flat.ratio[STUDENT] is None
