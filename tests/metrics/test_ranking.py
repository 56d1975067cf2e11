"""Systems in the order of a criterion, from scores given."""

import pytest

from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import SarathiThroughput, mlperf
from disagg_jax.metrics.ranking import rank

P99 = mlperf(SLO(ttft_s=1.0, tpot_s=1.0))  # its target is 0.99


def figures(rows):
    return [(row["system"], row["known"], row["bound"]) for row in rows]


def test_systems_are_ordered_by_their_highest_passing_rate():
    rows = rank(
        P99,
        {
            "slow": {1.0: [1.0, 1.0], 1.1: [0.9, 0.9]},
            "fast": {4.0: [1.0, 1.0], 8.0: [0.98, 0.98]},
            "none": {0.5: [0.9, 0.8], 1.0: [0.2, 0.1]},
            "any": {7.0: [1.0, 1.0]},
        },
        tolerance=0.1,
    )
    assert figures(rows) == [
        ("any", "at least", 7.0),
        ("fast", "coarsely", None),  # 8 / 4 is more than 1.1
        ("slow", "yes", None),
        ("none", "below", 0.5),
    ]
    # 1 falls to 0.98 between 4 and 8, and so crosses 0.99 half way.
    assert rows[1]["mean"] == pytest.approx(6.0)


def test_a_rate_that_fails_below_one_that_passes_is_marked():
    rows = rank(
        P99,
        {
            "rises": {1.0: [0.5, 0.5], 2.0: [1.0, 1.0], 3.0: [0.0, 0.0]},
            "falls": {1.0: [1.0, 1.0], 1.1: [0.5, 0.5]},
        },
        tolerance=0.1,
    )
    assert [(row["system"], row["monotone"]) for row in rows] == [
        ("rises", False),
        ("falls", True),
    ]


def test_rates_that_are_apart_by_the_tolerance_are_near_enough():
    """2 and 2.5 by a quarter, which no binary fraction rounds."""
    apart = {2.0: [1.0, 1.0], 2.5: [0.9, 0.9]}
    assert rank(P99, {"a": apart}, tolerance=0.25)[0]["known"] == "yes"
    assert rank(P99, {"a": apart}, tolerance=0.24)[0]["known"] == "coarsely"


@pytest.mark.parametrize(
    ("criterion", "good"), [(P99, 1.0), (SarathiThroughput(), 7.0)]
)
def test_dependent_seeds_have_no_interval(criterion, good):
    scores = {"a": {1.0: [good, good], 2.0: [0.9, 0.8]}}
    for independent in (True, False):
        (row,) = rank(criterion, scores, tolerance=0.1, independent=independent)
        assert (row["low"] is not None) == independent
        assert (row["high"] is not None) == independent


def test_systems_of_one_figure_stay_in_their_order():
    same = {"b": {1.0: [2.0]}, "a": {1.0: [2.0]}, "c": {1.0: [3.0]}}
    rows = rank(SarathiThroughput(), same, tolerance=0.1)
    assert [row["system"] for row in rows] == ["c", "b", "a"]


def test_throughputs_are_ordered_by_the_best_score():
    rows = rank(
        SarathiThroughput(),
        {
            "peak": {1.0: [2.0], 2.0: [3.0], 4.0: [1.0]},
            "grows": {1.0: [2.0], 2.0: [4.0]},
        },
        tolerance=0.1,
    )
    assert figures(rows) == [("grows", "at least", None), ("peak", "yes", None)]
    assert [row["mean"] for row in rows] == [4.0, 3.0]
