"""Systems in the order of a criterion, from scores given."""

import pytest

from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import Sarathi, mlperf
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


def test_throughputs_are_ordered_by_the_best_score():
    rows = rank(
        Sarathi(),
        {
            "peak": {1.0: [2.0], 2.0: [3.0], 4.0: [1.0]},
            "grows": {1.0: [2.0], 2.0: [4.0]},
        },
        tolerance=0.1,
    )
    assert figures(rows) == [("grows", "at least", None), ("peak", "yes", None)]
    assert [row["mean"] for row in rows] == [4.0, 3.0]
