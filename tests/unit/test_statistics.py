"""Statistics of a report: errors, tests of pairs, recovery and chance."""

import math

import pytest

from linearize.report.results import BASE, STUDENT, WINDOW, make_metric, mean_and_error
from linearize.report.statistics import bootstrap_error, mcnemar, sign_flip_test, student_quantile

FIGURES = [float((7 * i) % 11) for i in range(200)]
SHIFTED_SINES = [0.3 + math.sin(i) for i in range(60)]
LOSSES = {BASE: [1.0, 2.0], STUDENT: [1.5, 2.5], WINDOW: [2.0, 3.0]}


def test_the_bootstrap_error_is_the_classical_one():
    mean = sum(FIGURES) / 200
    classical = math.sqrt(sum((v - mean) ** 2 for v in FIGURES) / 199 / 200)
    assert bootstrap_error(FIGURES) == pytest.approx(classical, rel=0.1)


def test_the_bootstrap_error_of_two_figures_is_half_their_distance():
    assert bootstrap_error([0.0, 2.0]) == pytest.approx(1.0, rel=0.1)


def test_the_bootstrap_error_comes_out_the_same_twice():
    assert bootstrap_error(FIGURES) == bootstrap_error(FIGURES)


def test_a_sign_flip_test_of_no_difference_is_certain_of_nothing():
    assert sign_flip_test([0.0] * 5) == 1.0


def test_a_sign_flip_test_needs_more_than_one_pair():
    assert sign_flip_test([1.0]) is None


@pytest.mark.parametrize(
    ("differences", "share"),
    [
        ([1.0, 1.1, 0.9, 1.2], 2 / 16),  # of 16 choices of signs two are as far from 0
        ([1.0, 1.1], 2 / 4),
        ([1.0, -1.1, 0.9, -0.8], 1),  # their sum is 0
    ],
)
def test_a_sign_flip_test_of_few_pairs_counts_every_choice_of_signs(differences, share):
    assert sign_flip_test(differences) == share


def test_a_sign_flip_test_of_many_pairs_draws_the_same_signs_every_time():
    assert sign_flip_test(SHIFTED_SINES) == sign_flip_test(SHIFTED_SINES)


def test_a_sign_flip_test_of_many_pairs_is_near_the_normal_one():
    normal = math.erfc(math.sqrt(60) * 0.3 / (0.7071 * math.sqrt(2)))
    assert sign_flip_test(SHIFTED_SINES) == pytest.approx(normal, abs=0.005)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (60, 2.000)]
)
def test_quantiles_are_those_of_student_s_table(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, abs=0.01)


def test_mcnemar_counts_the_items_on_which_two_models_differ():
    """With 1 against 9 discordant items: 2 (C(10,0) + C(10,1)) / 2^10."""
    assert mcnemar([1.0] + [0.0] * 9 + [1.0] * 4, [0.0] + [1.0] * 9 + [1.0] * 4) == pytest.approx(22 / 1024)


def test_mcnemar_of_the_same_answers_is_certain_of_nothing():
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0


def test_the_error_of_a_mean_is_the_classical_one():
    spread = [float(i % 7) for i in range(50)]
    classical = (sum((x - 2.92) ** 2 for x in spread) / 49 / 50) ** 0.5
    assert mean_and_error(spread).error == pytest.approx(classical, rel=0.1)


def test_a_single_unit_has_no_error():
    assert math.isnan(mean_and_error([1.0]).error)


def test_a_perplexity_is_the_exponential_of_the_mean_loss():
    metric = make_metric("perplexity@8", "lower", LOSSES, exponentiate=True)
    assert metric.values[BASE].mean == pytest.approx(math.exp(1.5))


def test_a_ratio_is_the_student_over_the_base():
    metric = make_metric("perplexity@8", "lower", LOSSES, exponentiate=True)
    assert metric.ratio[STUDENT] == pytest.approx(math.exp(0.5))


def test_a_difference_is_paired_unit_by_unit():
    metric = make_metric("perplexity@8", "lower", LOSSES, exponentiate=True)
    assert (metric.difference.mean, metric.difference.error) == (pytest.approx(0.5), pytest.approx(0.0))


def test_recovery_is_the_share_of_the_window_s_loss_that_came_back():
    assert make_metric("perplexity@8", "lower", LOSSES, exponentiate=True).recovery == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("window", "recovery"), [([1.2, 1.41, 1.09, 1.3], pytest.approx(0.5, abs=0.01)), ([1.0, 1.2, 1.5, 1.3], None)]
)
def test_recovery_needs_a_loss_that_stands_out(window, recovery):
    losses = {BASE: [1.0, 1.2, 0.9, 1.1], STUDENT: [1.1, 1.3, 1.0, 1.2], WINDOW: window}
    assert make_metric("perplexity@64", "lower", losses).recovery == recovery


def test_recovery_needs_more_than_one_unit():
    assert make_metric("perplexity@64", "lower", {BASE: [1.0], STUDENT: [1.1], WINDOW: [9.0]}).recovery is None


@pytest.mark.parametrize(
    ("better", "units"),
    [
        # worse than the base by less than its noise
        ("lower", {BASE: [1.0, 2.0, 3.0], STUDENT: [1.0, 2.0, 3.0], WINDOW: [3.0, 1.0, 3.1]}),
        ("higher", {BASE: [0.5, 0.5], STUDENT: [0.4, 0.4], WINDOW: [0.9, 0.9]}),
        ("higher", {BASE: [0.0], STUDENT: [0.0], WINDOW: [0.0]}),
    ],
    ids=["noise", "better", "nothing"],
)
def test_nothing_is_recovered_where_the_window_lost_nothing(better, units):
    assert make_metric("recall@8", better, units).recovery is None


def test_there_is_no_ratio_to_a_base_of_zero():
    assert make_metric("recall@8", "higher", {BASE: [0.0], STUDENT: [0.0]}).ratio[STUDENT] is None


@pytest.fixture(scope="module")
def accuracy():
    units = {BASE: [1.0, 1.0, 1.0, 0.0], STUDENT: [1.0, 1.0, 0.0, 0.0]}
    return make_metric("arc_acc", "higher", units, chance=0.25, items=True)


def test_recovery_over_chance_counts_from_guessing(accuracy):
    assert accuracy.recovery_over_chance == pytest.approx(0.5)


def test_one_discordant_item_says_nothing(accuracy):
    assert accuracy.p_value == 1.0
