"""The goodput search on attainment curves that are known."""

import math

import pytest

from disagg_jax.metrics.goodput import best_rate, estimate, find_inversion
from disagg_jax.search.rates import SearchPlan, climb, refine, search

PLAN = SearchPlan(target=0.9, growth=2.0, tolerance=0.05, max_rates=30)


def falling(*limits):
    """Attainment of one seed for each limit: 1 up to it, then falling linearly."""
    tried = {}

    def evaluate(rate):
        tried[rate] = [min(1.0, max(0.0, 2 - rate / limit)) for limit in limits]
        return tried[rate]

    return evaluate, tried


@pytest.mark.parametrize("start", [0.1, 10.0, 5000.0])
def test_the_crossing_is_found_from_below_and_from_above(start):
    evaluate, tried = falling(100.0, 110.0, 90.0)
    search(evaluate, start, PLAN)
    found = estimate(tried, PLAN.target)
    # Attainment is 0.9 at 1.1 x limit: at 110, 121 and 99 for the three seeds. Each
    # one's crossing is found between the two tried rates around it.
    for rate, crossing in zip(found.per_seed_rps, (110, 121, 99), strict=True):
        below = max(tried_rate for tried_rate in tried if tried_rate <= crossing)
        above = min(tried_rate for tried_rate in tried if tried_rate > crossing)
        assert below <= rate <= above
    # The mean curve crosses near 109 (1 up to 90, then a seed at a time falls).
    assert found.pass_rps < 110 < found.fail_rps * 1.02
    assert found.fail_rps / found.pass_rps <= 1.05
    assert found.bracketed


def test_every_seed_is_seen_to_pass_and_to_fail():
    evaluate, tried = falling(10.0, 1000.0)
    search(evaluate, 50.0, PLAN)
    for seed in (0, 1):
        values = [attainments[seed] for attainments in tried.values()]
        assert max(values) >= 0.9 > min(values)


def test_a_goodput_is_bracketed_where_every_seeds_crossing_was_seen():
    assert estimate({1.0: [1.0, 0.95], 2.0: [0.5, 0.85]}, 0.9).bracketed
    for second in ((1.0, 0.9), (0.8, 0.7)):  # it never failed, or never passed
        curve = {1.0: [1.0, second[0]], 2.0: [0.5, second[1]]}
        assert not estimate(curve, 0.9).bracketed


def test_no_rate_is_evaluated_twice():
    calls = []

    def evaluate(rate):
        calls.append(rate)
        return [1.0 if rate < 7 else 0.0]

    search(evaluate, 1.0, PLAN)
    assert len(calls) == len(set(calls))


def test_a_bracket_of_just_the_tolerance_is_narrow_enough():
    calls = []

    def evaluate(rate):
        calls.append(rate)
        return [1.0 if rate < 1.5 else 0.0]

    search(evaluate, 1.0, SearchPlan(growth=1.5, tolerance=0.5))
    assert calls == [1.0, 1.5]


def test_a_system_that_always_fails_has_no_goodput_and_the_search_ends():
    calls = []

    def evaluate(rate):
        calls.append(rate)
        return [0.0, 0.0]

    search(evaluate, 1.0, SearchPlan(max_rates=6))
    assert len(calls) == 6
    found = estimate({rate: [0.0, 0.0] for rate in calls}, 0.9)
    assert found.per_seed_rps == (0.0, 0.0)
    assert found.pass_rps is None
    assert not found.bracketed and not found.resolved


def test_resolved_needs_both_intervals_on_their_sides():
    # Seeds agree: at 1 all pass, at 2 all fail.
    sharp = {1.0: [1.0, 1.0, 0.99], 2.0: [0.1, 0.12, 0.1]}
    assert estimate(sharp, 0.9).resolved
    # At 1 the mean passes (0.933), but one seed is far below.
    noisy = {1.0: [1.0, 1.0, 0.8], 2.0: [0.1, 0.12, 0.1]}
    assert not estimate(noisy, 0.9).resolved
    # Nothing shows where what never failed ends, or what never passed.
    assert not estimate({1.0: [1.0, 1.0], 2.0: [1.0, 1.0]}, 0.9).resolved
    assert not estimate({1.0: [0.1, 0.1], 2.0: [0.1, 0.1]}, 0.9).resolved


def test_runs_that_are_no_independent_samples_resolve_nothing():
    sharp = {1.0: [1.0, 1.0, 0.99], 2.0: [0.1, 0.12, 0.1]}
    found = estimate(sharp, 0.9, independent=False)
    assert not found.resolved and found.bracketed
    assert found.interval.low is None and found.interval.high is None
    assert found.interval.mean == estimate(sharp, 0.9).interval.mean
    assert best_rate(sharp, 0.1, independent=False).interval.low is None


def test_the_goodput_is_by_default_that_of_90_per_cent_as_in_the_papers():
    calls = {}

    def evaluate(rate):
        calls[rate] = [1.0 if rate < 2 else 0.9 if rate < 8 else 0.89]
        return calls[rate]

    search(evaluate, 1.0, SearchPlan(growth=2.0, tolerance=1.0))
    assert list(calls) == [1.0, 2.0, 4.0, 8.0]


def test_a_goodput_does_not_begin_below_0():
    uneven = {1.0: [1.0, 0.0, 0.0], 2.0: [1.0, 0.0, 0.0], 4.0: [0.0, 0.0, 0.0]}
    assert estimate(uneven, 0.9).interval.low == 0.0
    assert best_rate(uneven, 0.1).interval.low == 0.0


# ---- attainment that is not monotone in the rate -------------------------------------


def both(curve):
    """The same attainment for two seeds."""
    return {rate: [share, share] for rate, share in curve.items()}


# (curve, goodput, passes at, fails at, (worst failure, the next pass above it))
SHAPES = {
    "falls": ({1: 1.0, 2: 0.95, 4: 0.85}, 3.0, 2, 4, None),
    "fails": ({1: 0.5, 2: 0.3}, 0.0, None, 1, None),
    "fails, ever less": ({1: 0.2, 2: 0.5, 4: 0.8}, 0.0, None, 1, None),
    "passes": ({1: 0.9, 2: 1.0}, 2.0, 2, None, None),
    "just passes": ({1: 0.9, 2: 0.5, 4: 1.0, 8: 0.0}, 1.0, 1, 2, (2, 4)),
    "rises": ({20: 0.46, 200: 0.98}, 200.0, 200, None, (20, 200)),
    "rises and falls": ({1: 0.3, 2: 0.8, 4: 1.0, 8: 0.8}, 6.0, 4, 8, (1, 4)),
    "dips": ({1: 1.0, 2: 0.8, 3: 0.95, 4: 0.1}, 1.5, 1, 2, (2, 3)),
    "rises and dips": (
        {1: 0.7, 2: 1.0, 3: 0.8, 4: 0.6, 5: 0.9, 6: 0.0},
        2.5,
        2,
        3,
        (4, 5),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_goodput_of_given_rates_begins_at_the_lowest_that_passes(shape):
    curve, goodput, passes, fails, inverted = SHAPES[shape]
    found = estimate(both(curve), 0.9)
    assert found.per_seed_rps == pytest.approx((goodput, goodput))
    assert (found.pass_rps, found.fail_rps) == (passes, fails)
    assert found.inversion == find_inversion(both(curve), 0.9)
    if inverted is None:
        assert found.inversion is None
    else:
        at = (found.inversion.fail_rps, found.inversion.pass_rps)
        scores = (found.inversion.fail_score, found.inversion.pass_score)
        assert at == inverted
        assert scores == pytest.approx(tuple(curve[rate] for rate in inverted))


def test_an_inversion_is_of_the_mean_over_seeds():
    """One seed's own dip is luck that the mean does not share."""
    found = estimate({1.0: [0.8, 1.0], 2.0: [1.0, 1.0], 4.0: [0.0, 0.0]}, 0.9)
    assert found.inversion is None
    # The seed that fails at the lowest rate has its crossing above that.
    assert found.per_seed_rps == pytest.approx((2.2, 2.2))


def test_an_inversion_says_both_rates_per_device():
    found = find_inversion({20.0: [0.5, 0.42], 200.0: [1.0, 0.96]}, 0.9)
    assert found.text(2) == (
        "attainment is not monotone in the rate: 46.0% at 10 requests/s per device, "
        "98.0% at 100"
    )


def hump(rate):
    """Too slow below 30 requests/s, and above 300."""
    return [0.5 if rate < 30 else 0.97 if rate < 300 else 0.1] * 2


@pytest.mark.parametrize("start", [2.0, 10.0, 50.0, 290.0, 2000.0, 40_000.0])
def test_a_search_finds_what_passes_above_rates_that_fail(start):
    tried = {}

    def evaluate(rate):
        tried[rate] = hump(rate)
        return tried[rate]

    search(evaluate, start, PLAN)
    found = estimate(tried, PLAN.target)
    assert 30 <= found.pass_rps < 300 <= found.fail_rps
    # From far below there are few rates left for a bisection.
    assert found.fail_rps <= found.pass_rps * (1.05 if start > 2 else 1.3)
    assert len(tried) <= PLAN.max_rates
    lowest_passes = min(tried) >= 30
    assert (found.inversion is None) == lowest_passes
    if start < 30:
        assert found.inversion.fail_rps < 30 <= found.inversion.pass_rps


def test_a_search_that_fails_everywhere_looks_above_its_start_too():
    tried = []

    def evaluate(rate):
        tried.append(rate)
        return [0.0]

    search(evaluate, 1.0, SearchPlan(growth=2.0, max_rates=8))
    assert len(tried) == 8
    assert sorted(tried) == [2.0**k for k in range(-5, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.0}, "target: expected in"),
        ({"growth": 1.0}, "growth: expected > 1"),
        ({"tolerance": 0.0}, "tolerance: expected > 0"),
        ({"max_rates": 1}, "max_rates: expected >= 2"),
    ],
)
def test_bad_plans_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SearchPlan(**change)


# ---- throughputs ---------------------------------------------------------------------


@pytest.mark.parametrize("start", [1.0, 40.0, 3000.0])
def test_a_peak_is_found_from_below_and_from_above(start):
    tried = {}

    def evaluate(rate):  # two seeds; rises to 60 at 60, then falls to 0 at 120
        value = max(0.0, 60 - abs(rate - 60))
        tried[rate] = [value, value + 2]
        return tried[rate]

    climb(evaluate, start, PLAN)
    found = best_rate(tried, PLAN.tolerance)
    # Within the tolerance of the peak, and not many rates were tried for it.
    assert 60 / 1.05 <= found.rate_rps <= 60 * 1.05
    assert found.per_seed == tuple(tried[found.rate_rps])
    assert found.interval.mean == sum(found.per_seed) / 2
    assert found.bracketed
    assert len(tried) < 20
    # The lowest rate within the tolerance of the best has neighbours that are near.
    enough = found.interval.mean / 1.05
    rates = sorted(tried)
    at = next(i for i, rate in enumerate(rates) if sum(tried[rate]) / 2 >= enough)
    assert rates[at] <= 1.05 * rates[at - 1] and rates[at + 1] <= 1.05 * rates[at]


def test_a_plateau_is_not_followed():
    tried = {}

    def evaluate(rate):  # levels off, but never quite
        tried[rate] = [50 * rate / (rate + 1)]
        return tried[rate]

    climb(evaluate, 1.0, PLAN)
    found = best_rate(tried, PLAN.tolerance)
    # 64 / 65 gains less than 5 % over 16 / 17 and 32 / 33.
    assert max(tried) <= 64
    assert found.per_seed[0] >= 50 / 1.05**2
    assert found.bracketed


def test_a_throughput_that_always_rises_is_followed_for_as_many_rates_as_may_be():
    tried = []

    def evaluate(rate):
        tried.append(rate)
        return [rate]

    climb(evaluate, 1.0, SearchPlan(growth=2.0, max_rates=5))
    assert tried == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_neighbours_of_just_the_tolerance_are_near():
    tried = []

    def evaluate(rate):
        tried.append(rate)
        return [{1.0: 1.0, 2.0: 10.0}.get(rate, 1.0)]

    climb(evaluate, 1.0, SearchPlan(growth=2.0, tolerance=1.0))
    assert tried == [1.0, 2.0, 4.0]


def test_of_equal_throughputs_the_lowest_rate_counts():
    found = best_rate({1.0: [5.0], 2.0: [7.0], 4.0: [7.0]}, 0.1)
    assert found.rate_rps == 2.0
    # In whatever order they were tried, and by their means.
    found = best_rate({8.0: [6.0, 8.0], 2.0: [7.0, 7.0], 4.0: [9.0, 5.0]}, 0.1)
    assert (found.rate_rps, found.per_seed) == (2.0, (7.0, 7.0))


def test_a_gain_of_just_the_tolerance_is_no_gain():
    # 2 requests/s give twice as much as 1, which a tolerance of 100 % allows: the curve
    # may have levelled off below the lowest rate.
    assert not best_rate({1.0: [2.0], 2.0: [4.0], 4.0: [1.0]}, 1.0).bracketed
    assert best_rate({1.0: [2.0], 2.0: [4.5], 4.0: [1.0]}, 1.0).bracketed


def test_the_best_of_rates_at_the_edge_is_only_a_bound():
    assert not best_rate({1.0: [1.0], 2.0: [2.0]}, 0.1).bracketed
    assert not best_rate({1.0: [2.0], 2.0: [1.0]}, 0.1).bracketed


# -- around a goodput that is roughly known --------------------------------------------


def refined(crossings, goodput_rps=100.0, **plan):
    """The rates that `refine` evaluates, by seeds that cross at these rates."""
    rates = []

    def evaluate(rate):
        rates.append(rate)
        return [1.0 if rate <= crossing else 0.0 for crossing in crossings]

    refine(evaluate, goodput_rps, SearchPlan(tolerance=0.21, **plan))
    return rates


def test_a_goodput_is_refined_outwards_until_every_seed_has_passed_and_failed():
    assert refined([100.0, 100.0]) == pytest.approx([100 / 1.1, 110.0])
    below = [100 / 1.1, 100 / 1.1 / 1.21]
    assert refined([80.0, 100.0]) == pytest.approx([*below, 110.0])
    above = [110.0, 110 * 1.21]
    assert refined([120.0, 100.0]) == pytest.approx([100 / 1.1, *above])


def test_more_seeds_are_run_at_rates_that_fewer_were():
    few, many = refined([100.0] * 2), refined([100.0, 80.0, 120.0])
    assert set(few) <= set(many)


def test_refining_ends_where_a_seed_never_passes_or_fails():
    rates = refined([0.0, math.inf], max_rates=6)
    assert len(rates) == 6
