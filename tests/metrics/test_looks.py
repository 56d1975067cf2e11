"""Intervals that are looked at several times: do they cover the truth often enough?"""

import itertools
import math

import numpy as np
import pytest

from disagg_jax.metrics import (
    Interval,
    interval_across,
    look_confidence,
    runs_to_tell,
)

LOOKS = (4, 8, 16)
GOODPUT_RPS = 100.0
TRIALS = 40_000


def half_widths(seen, confidence):
    """Return half the interval of each row, by the factor of `interval_across`."""
    probe = [0.0, 1.0] * (seen.shape[1] // 2)
    found = interval_across(probe, confidence)
    return (found.high - found.mean) * np.std(seen, axis=1) / np.std(probe)


def coverage(confidence):
    """Return how often the interval has the true goodput in it, at the look that ends.

    Each seed's goodput is off by 3 requests/s. A run stops when attainment, which falls
    with the rate, surely passes 5 % below the goodput that was scouted, and surely
    fails 5 % above.
    """
    rng = np.random.default_rng(0)
    seeds = GOODPUT_RPS + 3 * rng.standard_normal((TRIALS, LOOKS[-1]))
    covered, running = np.zeros(TRIALS, bool), np.ones(TRIALS, bool)
    for look in LOOKS:
        seen = seeds[:, :look]
        mean, half = seen.mean(axis=1), half_widths(seen, confidence)
        resolved = (mean - half >= 95) & (mean + half < 105)
        ends = running & (resolved | (look == LOOKS[-1]))
        covered[ends] = (abs(mean - GOODPUT_RPS) <= half)[ends]
        running &= ~ends
    return covered.mean()


def test_corrected_intervals_cover_the_truth_whenever_the_run_stops():
    corrected = coverage(look_confidence(len(LOOKS)))
    assert corrected >= 0.95
    # Whoever stops when the runs happen to agree is wrong more often than 5 %.
    assert coverage(0.95) < 0.945


def test_the_factor_of_an_interval_is_that_of_the_library():
    seen = np.random.default_rng(1).standard_normal((2, 8))
    for row, half in itertools.zip_longest(seen, half_widths(seen, 0.9)):
        found = interval_across(row.tolist(), 0.9)
        assert found.high - found.mean == pytest.approx(half)


def test_twice_the_distance_from_1_needs_a_quarter_of_the_runs():
    """0.5 to 2 about a mean of 2 ** 0.5 is twice as wide as it may be: 4 x the runs."""
    wide = Interval(mean=2**0.5, low=2**-0.5, high=2**1.5)
    assert runs_to_tell(wide, 4) == pytest.approx(16)
    far = Interval(mean=2.0, low=1.0, high=4.0)
    assert runs_to_tell(far, 4) == pytest.approx(4)
    assert runs_to_tell(Interval(mean=1.0, low=0.5, high=2.0), 4) == math.inf
    assert runs_to_tell(Interval(mean=2.0, low=None, high=None), 4) == math.inf


def test_one_look_needs_no_correction():
    assert look_confidence(1) == pytest.approx(0.95)
    assert look_confidence(3) == pytest.approx(1 - 0.05 / 3)
    with pytest.raises(ValueError, match="looks: expected >= 1, got 0"):
        look_confidence(0)
