"""Finding a goodput: which rates to try, and what they say.

Every rate is tried with every seed, and all systems see the same arrivals and lengths
at the same seed (common random numbers), so that ratios can be paired by seed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from disagg_jax import metrics

# rate in requests/s -> joint attainment of each seed's run
Evaluate = Callable[[float], Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How to look for the highest rate whose attainment is at least the target."""

    target: float = 0.9  # joint attainment to reach, (0, 1]
    growth: float = 1.6  # factor between the rates of the first sweep, > 1
    tolerance: float = 0.1  # bisect until fail / pass rate <= 1 + tolerance
    max_rates: int = 20  # rates to try at most

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target: expected in (0, 1], got {self.target}")
        if not self.growth > 1:
            raise ValueError(f"growth: expected > 1, got {self.growth}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: expected > 0, got {self.tolerance}")
        if self.max_rates < 2:
            raise ValueError(f"max_rates: expected >= 2, got {self.max_rates}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputEstimate:
    """A system's goodput, in requests/s of the whole deployment."""

    per_seed_rps: tuple[float, ...]  # each seed's own crossing of the target
    interval: metrics.Interval  # across seeds
    pass_rps: float | None  # highest rate tried at which the mean attainment passes
    fail_rps: float | None  # the rate above it, at which it fails
    bracketed: bool  # both ends were seen for every seed
    resolved: bool  # the intervals at both ends lie on their side of the target


def search(evaluate: Evaluate, start_rps: float, plan: SearchPlan) -> None:
    """Evaluates rates around the goodput: up and down from the start, then bisection.

    The first sweep goes on until every seed was seen to pass and to fail, so that every
    seed has a crossing of its own.
    """
    tried: dict[float, Sequence[float]] = {}

    def attainments(rate_rps: float) -> Sequence[float]:
        if rate_rps not in tried:
            tried[rate_rps] = evaluate(rate_rps)
        return tried[rate_rps]

    low = high = start_rps
    while max(attainments(high)) >= plan.target and len(tried) < plan.max_rates:
        high *= plan.growth
    while min(attainments(low)) < plan.target and len(tried) < plan.max_rates:
        low /= plan.growth
    while len(tried) < plan.max_rates:
        passing, failing = _bracket(tried, plan.target)
        if not passing or failing is None or failing <= passing * (1 + plan.tolerance):
            return
        attainments(math.sqrt(passing * failing))


def _bracket(
    tried: Mapping[float, Sequence[float]], target: float
) -> tuple[float, float | None]:
    points = [(rate, statistics.mean(values)) for rate, values in tried.items()]
    found = metrics.goodput(points, target)
    return found.pass_rps or 0.0, found.fail_rps


def estimate(
    attainments: Mapping[float, Sequence[float]], target: float
) -> GoodputEstimate:
    """What evaluated points say about the goodput.

    Args:
      attainments: rate -> joint attainment of each seed, the same seeds at each rate.
    """
    seeds = len(next(iter(attainments.values())))
    per_seed = [
        metrics.goodput([(r, values[i]) for r, values in attainments.items()], target)
        for i in range(seeds)
    ]
    passing, failing = _bracket(attainments, target)
    resolved = bool(passing) and failing is not None
    if resolved and failing is not None:
        resolved = metrics.is_resolved(
            metrics.interval_across(attainments[passing]),
            metrics.interval_across(attainments[failing]),
            target,
        )
    rates = tuple(found.rate_rps for found in per_seed)
    return GoodputEstimate(
        per_seed_rps=rates,
        interval=metrics.interval_across(rates),
        pass_rps=passing or None,
        fail_rps=failing,
        bracketed=all(found.bracketed and found.rate_rps > 0 for found in per_seed),
        resolved=resolved,
    )
