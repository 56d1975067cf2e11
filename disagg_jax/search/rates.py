"""Which rates to try, to find a goodput or the highest throughput.

`disagg_jax.metrics.goodput` says what the rates that were tried show.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from disagg_jax.errors import require
from disagg_jax.metrics.goodput import Scores, bracket, knee

# Rate in requests/s -> score of each seed's run: a joint attainment, or another share
# or throughput that a criterion counts (`metrics.criteria`).
Evaluate = Callable[[float], Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How to look for the highest rate whose attainment is at least the target."""

    target: float = 0.9  # joint attainment to reach, (0, 1]
    growth: float = 1.6  # factor between the rates of the first sweep, > 1
    tolerance: float = 0.1  # bisect until fail / pass rate <= 1 + tolerance
    max_rates: int = 20  # rates to try at most

    def __post_init__(self) -> None:
        require(0 < self.target <= 1, "target: expected in (0, 1]", self.target)
        require(self.growth > 1, "growth: expected > 1", self.growth)
        require(self.tolerance > 0, "tolerance: expected > 0", self.tolerance)
        require(self.max_rates >= 2, "max_rates: expected >= 2", self.max_rates)


def search(evaluate: Evaluate, start_rps: float, plan: SearchPlan) -> None:
    """Evaluate rates around the goodput: up and down from the start, then bisect.

    The first sweep goes on until every seed has passed and failed, so that every seed
    has its own crossing. While no rate passes, a third of the rates is kept for rates
    above the first: attainment may rise with the rate.
    """
    tried: dict[float, Sequence[float]] = {}

    def attainments(rate_rps: float) -> Sequence[float]:
        if rate_rps not in tried:
            tried[rate_rps] = evaluate(rate_rps)
        return tried[rate_rps]

    low = high = start_rps
    while max(attainments(high)) >= plan.target and len(tried) < plan.max_rates:
        high *= plan.growth
    while min(attainments(low)) < plan.target and len(tried) < _most_down(tried, plan):
        low /= plan.growth
    passed = bool(bracket(tried, plan.target)[0])
    while not passed and len(tried) < plan.max_rates:
        high *= plan.growth
        passed = statistics.mean(attainments(high)) >= plan.target
    while max(attainments(high)) >= plan.target and len(tried) < plan.max_rates:
        high *= plan.growth
    while len(tried) < plan.max_rates:
        passing, failing = bracket(tried, plan.target)
        if not passing or failing is None or failing <= passing * (1 + plan.tolerance):
            return
        attainments(math.sqrt(passing * failing))


def refine(evaluate: Evaluate, goodput_rps: float, plan: SearchPlan) -> None:
    """Evaluate rates around a goodput that is roughly known, by more seeds.

    They lie half a tolerance beside it and then a tolerance apart, outwards until every
    seed has passed and failed. So equal arguments give equal rates, and a call with
    more seeds needs only the runs of these.
    """
    step = 1 + plan.tolerance
    for factor in (1 / step, step):
        rate = goodput_rps * math.sqrt(factor)
        for _ in range(plan.max_rates // 2):
            scores = evaluate(rate)
            passed, failed = min(scores) >= plan.target, max(scores) < plan.target
            if passed if factor < 1 else failed:
                break
            rate *= factor


def _most_down(tried: Scores, plan: SearchPlan) -> int:
    """Return how many rates to try before looking above the first."""
    passed = bool(bracket(tried, plan.target)[0])
    return plan.max_rates if passed else plan.max_rates - plan.max_rates // 3


def climb(evaluate: Evaluate, start_rps: float, plan: SearchPlan) -> None:
    """Evaluate rates around the highest throughput, until its neighbours are near."""
    means: dict[float, float] = {}
    rate: float | None = start_rps
    while rate is not None and len(means) < plan.max_rates:
        means[rate] = statistics.mean(evaluate(rate))
        rate = _next_rate(means, plan)


def _next_rate(means: Mapping[float, float], plan: SearchPlan) -> float | None:
    """Return the next rate beside the best; None if both its neighbours are near."""
    rates = sorted(means)
    at = rates.index(knee(means, plan.tolerance))
    if at == len(rates) - 1:
        return rates[at] * plan.growth
    if at == 0:
        return rates[at] / plan.growth
    for low, high in ((rates[at], rates[at + 1]), (rates[at - 1], rates[at])):
        if high > low * (1 + plan.tolerance):
            return math.sqrt(low * high)
    return None
