"""The tick of a clock, and rows of one tick spread over it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.workload.traces.clock import find_clock, spread_ties


def tick_of(times):
    return find_clock(np.array(times, dtype=float)).tick_s


def spread(times):
    times = np.array(times, dtype=float)
    tick_s = find_clock(times).tick_s
    return times if tick_s is None else spread_ties(times, tick_s)


TICKS = st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0, 3.0, 7.5, 60.0, 1 / 3, 1 / 60])


@given(
    TICKS,
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=30),
    st.sampled_from([0.0, 12.5, 1_700_000_000.0]),
)
def test_any_tick_is_found_and_its_rows_are_spread_evenly(tick_s, ticks, start_s):
    """Whatever the first time, the pauses, and how many rows a tick has."""
    ticks = [(1, 3), *ticks]  # one pause is a tick, and one tick has three rows
    at = np.cumsum([pause for pause, _ in ticks])
    sizes = [rows for _, rows in ticks]
    times = start_s + tick_s * np.repeat(at, sizes)
    assert tick_of(times) == pytest.approx(tick_s, rel=1e-5)
    expected = [
        start_s + tick_s * (a + i / n)
        for a, n in zip(at, sizes, strict=True)
        for i in range(n)
    ]
    found = spread(times)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tick_s * 1e-4 + 1e-6)
    assert np.all(np.diff(found) > 0)
    np.testing.assert_array_equal(spread(found), found)  # nothing is left to spread


@given(st.integers(0, 2**32), st.integers(15, 300), st.sampled_from([7, 6, 4, 3, None]))
def test_accidental_ties_in_a_fine_clock_stay(seed, n, digits):
    """As of Azure's trace with 7 decimals, or of floats."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1.0, n))
    times = times if digits is None else np.round(times, digits)
    times = np.sort([*times, times[n // 2], times[n // 3]])
    assert tick_of(times) is None


@pytest.mark.parametrize("times", [[0.0, 1.98, 1.98], [0, 1, 1, 5, 6, 10]])
def test_one_tie_of_few_rows_shows_no_tick(times):
    assert tick_of(times) is None


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, 0, 3, 3], [0, 1.5, 3, 4.5]),  # the last tick, too
        ([5, 5, 5], [5, 5, 5]),  # no second time shows what the tick is
        ([2, 5, 8, 11], [2, 5, 8, 11]),  # no ties: nothing shows that it ticks
        ([0, 0, 9, 9, 12], [0, 1.5, 9, 10.5, 12]),  # 3 s, though only one gap has it
        ([0, 0, 4, 6, 6], [0, 1, 4, 6, 7]),  # 2 s, though no gap but multiples
        ([0.3, 0.3, 0.1 * 6, 0.1 * 6, 0.9], [0.3, 0.45, 0.6, 0.75, 0.9]),  # noise
        ([], []),
        ([1], [1]),
    ],
)
def test_ticks_by_hand(times, expected):
    assert spread(times) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("times", "tick_s"),
    [
        # The mean gap is 1 s, and of that the tick is 1 %, which is coarse; or less.
        ([0, 0, 0, 3.99, 4.0], 0.01),
        ([0, 0, 0, 4.0, 4.01], None),
        ([0, 0, 0, 3.9, 4.0], 0.1),
    ],
)
def test_a_tick_is_coarse_from_a_hundredth_of_the_mean_gap_on(times, tick_s):
    assert tick_of(times) == tick_s
    # Whenever the trace begins.
    assert tick_of([time + 64.0 for time in times]) == tick_s


@pytest.mark.parametrize("tick_s", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_clocks_tick_in_up_to_five_decimals(tick_s):
    times = [0, 0, 0, 3 * tick_s, 4 * tick_s]
    assert tick_of(times) == pytest.approx(tick_s)
    assert spread(times)[:4] == pytest.approx([0, tick_s / 3, 2 * tick_s / 3, times[3]])


def test_a_third_of_a_second_though_no_gap_is_one():
    times = np.repeat(np.cumsum([2, 3, 2, 5, 3, 2, 2, 4, 3, 5, 2, 3]) / 3, 2)
    assert tick_of(times) == pytest.approx(1 / 3)
    # Ten times show it, nine do not.
    assert tick_of(times[:20]) == pytest.approx(1 / 3)
    assert tick_of(times[:18]) is None


def test_a_burst_in_a_fine_clock_stays_a_burst():
    """20 rows at once every 10 s or so, in ms: the tick is a ms, and too fine."""
    rng = np.random.default_rng(0)
    starts = np.round(np.cumsum(rng.exponential(10.0, 50)), 3)
    times = np.repeat(starts, 20)
    assert tick_of(times) is None


def test_a_clock_that_is_not_quite_regular():
    """Written every 3 s and a few ms: as good as every 3 s."""
    late = np.random.default_rng(0).uniform(0, 0.005, 40)
    times = np.repeat(3.0 * np.arange(40) + late, 5)
    assert tick_of(times) == pytest.approx(3.0, rel=2e-3)
    # In whole ms, too, which are a tick of their own, but too fine a one.
    assert tick_of(np.round(times, 3)) == pytest.approx(3.0, rel=2e-3)
    assert np.diff(spread(times)) == pytest.approx(0.6, abs=0.01)
