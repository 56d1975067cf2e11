"""Numbers and their intervals as text."""

import pytest

from disagg_jax.metrics import Interval, interval_across
from experiments.report import intervals
from experiments.report.intervals import interval_text, ratio_text


def test_an_interval_is_shown_where_there_is_one():
    for low, high in ((None, None), (None, 3.0), (1.0, None)):
        assert interval_text(Interval(mean=2.0, low=low, high=high)) == "2.00"
    # t of two degrees of freedom is 4.303: 3 +- 4.303 * sqrt(7 / 3).
    shown = interval_text(interval_across([1.0, 2.0, 6.0]), ".1f", " s")
    assert shown == "3.0 s [-3.6, 9.6]"


def test_a_rate_is_never_negative():
    assert intervals.across_seeds([1.0, 2.0, 6.0], ".1f") == "3.0 [0.0, 9.6]"


def test_percentages_stay_within_bounds():
    assert intervals.percent([1.0, 0.9]) == "95.0 % [31.5, 100.0]"
    assert intervals.percent([0.0, 0.1]) == "5.0 % [0.0, 68.5]"


def test_a_ratio_is_paired_by_seed():
    assert ratio_text([2.0, 6.0], [1.0, 2.0]).startswith("2.50x [")  # not 8 / 3
    assert ratio_text([2.0, 6.0], [1.0, 0.0], "no ratio") == "no ratio"


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (2.5e6, "2.5")])
def test_a_value_that_is_not_there_is_a_dash(value, shown):
    assert intervals.number(value, ".1f", 1e6) == shown
