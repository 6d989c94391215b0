"""Which heads keep softmax: even layouts, placements by name and window."""

import pytest

from linearize.conversion.keep_softmax import scored_share, softmax_heads, spread_evenly, top_heads
from linearize.conversion.probes import require_distances
from linearize.conversion.scoring import combined
from linearize.errors import ConfigError
from linearize.evaluation.weights import spread_softmax_heads
from linearize.plan import LayerPlan, Plan


def test_heads_at_even_distances():
    assert spread_evenly(3, 3, 3) == ((0,), (0,), (0,))
    assert spread_evenly(4, 3, 2) == ((0, 1), (1,), (0,))
    for count in range(1, 91):
        heads = spread_evenly(count, 30, 3)
        assert sum(map(len, heads)) == count and max(map(len, heads)) - min(map(len, heads)) <= 1


def test_layers_of_the_base_take_no_part_in_the_uniform_layout():
    native = LayerPlan((0, 1), native=True)
    assert not native.has_branch and Plan("gemma2", (native, LayerPlan((1,), window=9))).longest_window() == 9
    plan = Plan("gemma2", (native, LayerPlan((1,)), native, LayerPlan(())))
    spread = spread_softmax_heads(plan, 2)
    assert spread.layers[0] == spread.layers[2] == native
    assert [layer.softmax_heads for layer in spread.layers[1::2]] == [(0,), ()]
    with pytest.raises(ConfigError, match="nothing to spread"):
        spread_softmax_heads(Plan("gemma2", (native, LayerPlan(()))), 2)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("none", ((), (), ())),
        ("all", ((0, 1), (0, 1), (0, 1))),
        ("every:2", ((0, 1), (), (0, 1))),
        ("1", ((), (0, 1), ())),
        ("0, 2", ((0, 1), (), (0, 1))),
        ("2:1,0:0,2:0", ((0,), (), (0, 1))),
        ("1:1,0", ((0, 1), (1,), ())),
    ],
)
def test_placement(spec, wanted):
    assert softmax_heads(spec, 3, 2) == wanted


@pytest.mark.parametrize(
    "spec", ["some", "every:0", "every:x", "3", "0:2", "-1", "1:", ":1", "", "0,,1", "every:", "1.5"]
)
def test_bad_placement(spec):
    with pytest.raises(ConfigError, match="keep_softmax"):
        softmax_heads(spec, 3, 2)


SCORES = [[0.1, 0.9, 0.0], [0.5, 0.2, 0.3]]


@pytest.mark.parametrize(("share", "heads"), [(0.5, ((1,), (0, 2))), (0.01, ((1,), ()))])
def test_top_heads_are_those_with_the_highest_scores(share, heads):
    assert top_heads(SCORES, share) == heads


@pytest.mark.parametrize("by", ["recall", "text"])
def test_a_share_keeps_the_heads_that_score_highest(by):
    assert softmax_heads(f"{by}:50%", 2, 3, {by: SCORES}.get) == ((1,), (0, 2))


def test_a_share_is_a_percentage_or_a_fraction():
    assert scored_share("recall:12.5%") == scored_share("recall:0.125") == ("recall", 0.125)


@pytest.mark.parametrize("spec", ["recall:", "recall:0", "text:100%", "both:x", "recall:nan"])
def test_a_share_that_makes_no_sense_is_refused(spec):
    with pytest.raises(ConfigError, match=f"{spec.partition(':')[0]}:SHARE"):
        softmax_heads(spec, 2, 3, lambda by: SCORES)


def test_no_recall_is_scored_within_a_window():
    with pytest.raises(ConfigError, match="no recall can be scored"):
        require_distances((20, 60), 100, 512)


def test_combined_scores_are_shares_of_their_totals():
    assert combined([[3.0, 1.0], [-5.0, 0.0]], [[0.0, 0.0], [0.0, 0.02]]) == [[0.75, 0.25], [0.0, 1.0]]
