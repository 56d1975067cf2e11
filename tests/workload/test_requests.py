"""Arrivals, and common random numbers in the requests made of them."""

import itertools
import math

import numpy as np
import pytest

from disagg_jax.request import Sampling
from disagg_jax.workload import requests
from disagg_jax.workload.lengths import (
    FixedLengths,
    HistogramLengths,
    LognormalLengths,
    UniformLengths,
)
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


def make(**changes):
    arguments = {
        "n": 50,
        "rate_rps": 2.0,
        "prompt_lengths": HistogramLengths(edges=(1, 8, 64), weights=(1, 2)),
        "output_lengths": LognormalLengths(median=8, sigma=1, high=40),
        "seed": 3,
        "vocab_size": 5,
    }
    return requests.make_requests(**(arguments | changes))


def column(requests, name):
    return [getattr(request, name) for request in requests]


class TestMakeRequests:
    def test_deterministic(self):
        assert make() == make()
        assert make() != make(seed=4)

    def test_ids_follow_arrival(self):
        requests = make()
        assert column(requests, "id") == list(range(50))
        times_s = column(requests, "arrival_s")
        assert times_s == sorted(times_s) and times_s[0] > 0

    @pytest.mark.parametrize(
        "arrivals", [Arrivals(), Arrivals(kind="gamma", burstiness=0.5)]
    )
    def test_another_rate_scales_the_arrivals_only(self, arrivals):
        slow, fast = (make(rate_rps=r, arrivals=arrivals) for r in (1.0, 8.0))
        scaled = [8.0 * t for t in column(fast, "arrival_s")]  # exact: a power of two
        assert column(slow, "arrival_s") == scaled
        for name in ("prompt_tokens", "max_tokens", "prompt", "sampling"):
            assert column(slow, name) == column(fast, name)

    @pytest.mark.parametrize(
        "lengths",
        [
            UniformLengths(low=1, high=50),
            LognormalLengths(median=20, sigma=1, high=50),
            HistogramLengths(edges=(1, 8, 64), weights=(1, 2)),
        ],
    )
    def test_longer_run_begins_with_the_shorter(self, lengths):
        both = {"prompt_lengths": lengths, "output_lengths": lengths}
        arrivals = Arrivals(kind="gamma", burstiness=0.5)
        longer = make(n=51, arrivals=arrivals, **both)
        assert longer[:20] == make(n=20, arrivals=arrivals, **both)

    def test_streams_are_independent(self):
        """Other prompts leave arrivals, outputs and sampling seeds alone."""
        usual, other = make(), make(prompt_lengths=FixedLengths(tokens=3))
        for name in ("arrival_s", "max_tokens", "sampling"):
            assert column(usual, name) == column(other, name)
        same = UniformLengths(low=1, high=1000)
        requests = make(prompt_lengths=same, output_lengths=same)
        assert column(requests, "prompt_tokens") != column(requests, "max_tokens")

    def test_prompts(self):
        requests = make()
        tokens = set(itertools.chain(*column(requests, "prompt")))
        assert tokens == {0, 1, 2, 3, 4}  # all of the vocabulary, token 0 included
        assert set(column(make(vocab_size=None), "prompt")) == {None}

    def test_each_request_samples_with_its_own_seed(self):
        requests = make(sampling=Sampling(temperature=0.5, top_k=3))
        assert len({r.sampling.seed for r in requests}) == 50
        assert {(r.sampling.temperature, r.sampling.top_k) for r in requests} == {
            (0.5, 3)
        }

    def test_benchmarks_ignore_eos(self):
        assert all(column(make(), "ignore_eos"))
        request = make(ignore_eos=False, eos_token=2)[0]
        assert request.stops_at(2)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n": 0}, "n: expected at least one"),
            ({"rate_rps": -2}, "rate_rps: expected > 0 .* got -2"),
            ({"vocab_size": 0}, "vocab_size: expected >= 1, got 0"),
            ({"seed": -1}, "seed: expected >= 0, got -1"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            make(**changes)


class TestRequestsFromPrompts:
    def make(self, **changes):
        arguments = {
            "n": 5,
            "rate_rps": 2.0,
            "prompts": [(1, 2, 3), (4,)],
            "output_tokens": [10, 20],
            "seed": 3,
        }
        return requests.requests_from_prompts(**(arguments | changes))

    def test_cycles(self):
        requests = self.make()
        a, b = (1, 2, 3), (4,)
        assert column(requests, "prompt") == [a, b, a, b, a]
        assert column(requests, "prompt_tokens") == [3, 1, 3, 1, 3]
        assert column(requests, "max_tokens") == [10, 20, 10, 20, 10]

    def test_shares_arrivals_with_random_prompts(self):
        expected = column(make(n=5), "arrival_s")
        assert column(self.make(), "arrival_s") == expected

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": [], "output_tokens": []}, "prompts: expected at least one"),
            ({"output_tokens": [10]}, "one for each of 2 prompts, got 1"),
            ({"prompts": [(1,), ()]}, "prompt of at least one token"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)
