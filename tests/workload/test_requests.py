"""Arrival processes: moments, rates and errors."""

import math

import numpy as np
import pytest

from disagg_jax.workload.requests import Arrivals

N = 40_000  # draws for moments: the mean of unit-variance draws is good to 0.5 %


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class TestArrivals:
    @pytest.mark.parametrize(
        ("arrivals", "variation"),
        [
            (Arrivals(kind="poisson"), 1.0),
            (Arrivals(kind="gamma", burstiness=0.25), 2.0),  # 1 / sqrt(shape)
            (Arrivals(kind="gamma", burstiness=4.0), 0.5),
        ],
    )
    def test_gaps(self, arrivals, variation):
        gaps_s = np.diff(arrivals.times_s(N, 5.0, rng()), prepend=0)
        assert gaps_s.min() >= 0
        # Standard errors: of the mean at most 2 / sqrt(N) = 1 %; of the deviation, for
        # the heaviest tail here (kurtosis 27), sqrt(26 / 4 N) = 1.3 %. Three of them.
        assert gaps_s.mean() == pytest.approx(1 / 5, rel=0.03)
        assert gaps_s.std() == pytest.approx(variation / 5, rel=0.04)

    def test_poisson_gaps_are_exponential(self):
        gaps_s = np.diff(Arrivals().times_s(N, 1.0, rng()), prepend=0)
        # P(gap > 1) = 1/e; standard error sqrt(.37 * .63 / N) = 0.24 %.
        assert (gaps_s > 1).mean() == pytest.approx(math.exp(-1), abs=0.01)

    def test_fixed(self):
        times_s = Arrivals(kind="fixed").times_s(3, 4.0, rng())
        assert times_s.tolist() == [0.25, 0.5, 0.75]  # the first after one gap

    def test_infinite_rate_is_a_burst(self):
        assert Arrivals().times_s(3, math.inf, rng()).tolist() == [0, 0, 0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "uniform"}, "expected one of .*got 'uniform'"),
            ({"kind": "gamma", "burstiness": 0}, "burstiness: expected > 0"),
            ({"kind": "gamma", "burstiness": math.nan}, "burstiness: expected > 0"),
            ({"kind": "poisson", "burstiness": 0.5}, "expected 1 unless gamma"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Arrivals(**arguments)

    @pytest.mark.parametrize("rate_rps", [0, -1, math.nan])
    def test_rate_is_positive(self, rate_rps):
        with pytest.raises(ValueError, match="rate_rps: expected > 0"):
            Arrivals().times_s(1, rate_rps, rng())

    def test_needs_a_request(self):
        with pytest.raises(ValueError, match="n: expected at least one"):
            Arrivals().times_s(0, 1.0, rng())
