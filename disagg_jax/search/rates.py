"""Finding a goodput, or the highest throughput: which rates to try, what they say.

Every rate is tried with every seed, and all systems see the same arrivals and lengths
at the same seed (common random numbers), so that ratios can be paired by seed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from disagg_jax import metrics

# rate in requests/s -> score of each seed's run: a joint attainment, or whatever share
# or throughput a criterion counts (`criteria`)
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
    # Where attainment is not monotone. The goodput is then that of the lowest rate that
    # passes, and those that pass in a row above it.
    inversion: Inversion | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inversion:
    """A rate at which the mean attainment fails, though it passes at a higher one."""

    fail_rps: float
    fail_score: float
    pass_rps: float  # the next one that passes
    pass_score: float

    def text(self, devices: float = 1.0) -> str:
        """What to say of it, in rates per device."""
        return (
            "attainment is not monotone in the rate: "
            f"{self.fail_score:.1%} at {self.fail_rps / devices:.4g} requests/s per "
            f"device, {self.pass_score:.1%} at {self.pass_rps / devices:.4g}"
        )


def find_inversion(
    attainments: Mapping[float, Sequence[float]], target: float
) -> Inversion | None:
    """The rate that fails the most clearly below one that passes; None if none does.

    Low rates can be served worse than high ones where a small batch takes longer than a
    large one. Or it is luck: attainments near the target, of few requests.
    """
    means = {rate: statistics.mean(attainments[rate]) for rate in sorted(attainments)}
    passing = [rate for rate, mean in means.items() if mean >= target]
    highest = max(passing, default=0.0)
    failing = [r for r, mean in means.items() if mean < target and r < highest]
    if not failing:
        return None
    worst = min(failing, key=lambda rate: means[rate])
    above = next(rate for rate in passing if rate > worst)
    return Inversion(
        fail_rps=worst,
        fail_score=means[worst],
        pass_rps=above,
        pass_score=means[above],
    )


def search(evaluate: Evaluate, start_rps: float, plan: SearchPlan) -> None:
    """Evaluates rates around the goodput: up and down from the start, then bisection.

    The first sweep goes on until every seed was seen to pass and to fail, so that every
    seed has a crossing of its own. While nothing passes, a third of the rates is kept
    for higher ones than the first: attainment may rise with the rate.
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
    passed = bool(_bracket(tried, plan.target)[0])
    while not passed and len(tried) < plan.max_rates:
        high *= plan.growth
        passed = statistics.mean(attainments(high)) >= plan.target
    while max(attainments(high)) >= plan.target and len(tried) < plan.max_rates:
        high *= plan.growth
    while len(tried) < plan.max_rates:
        passing, failing = _bracket(tried, plan.target)
        if not passing or failing is None or failing <= passing * (1 + plan.tolerance):
            return
        attainments(math.sqrt(passing * failing))


def _most_down(tried: Mapping[float, Sequence[float]], plan: SearchPlan) -> int:
    """How many rates to try before looking above the first."""
    passed = bool(_bracket(tried, plan.target)[0])
    return plan.max_rates if passed else plan.max_rates - plan.max_rates // 3


def _bracket(
    tried: Mapping[float, Sequence[float]], target: float
) -> tuple[float, float | None]:
    points = [(rate, statistics.mean(values)) for rate, values in tried.items()]
    found = _crossing(points, target)
    return found.pass_rps or 0.0, found.fail_rps


def _crossing(points: Sequence[tuple[float, float]], target: float) -> metrics.Goodput:
    """The first crossing of the target above the lowest rate that passes."""
    lowest = min((rate for rate, share in points if share >= target), default=0.0)
    return metrics.goodput([point for point in points if point[0] >= lowest], target)


def estimate(
    attainments: Mapping[float, Sequence[float]],
    target: float,
    *,
    independent: bool = True,
) -> GoodputEstimate:
    """What evaluated points say about the goodput.

    Args:
      attainments: rate -> joint attainment of each seed, the same seeds at each rate.
      independent: whether the seeds' runs are independent samples; if not, there is no
        interval, and nothing is resolved.
    """
    seeds = len(next(iter(attainments.values())))
    per_seed = [
        _crossing([(r, values[i]) for r, values in attainments.items()], target)
        for i in range(seeds)
    ]
    passing, failing = _bracket(attainments, target)
    resolved = bool(passing) and failing is not None
    if resolved and failing is not None:
        resolved = metrics.is_resolved(
            metrics.rate_interval(attainments[passing], independent=independent),
            metrics.rate_interval(attainments[failing], independent=independent),
            target,
        )
    rates = tuple(found.rate_rps for found in per_seed)
    return GoodputEstimate(
        per_seed_rps=rates,
        interval=metrics.rate_interval(rates, independent=independent),
        pass_rps=passing or None,
        fail_rps=failing,
        bracketed=all(found.bracketed and found.rate_rps > 0 for found in per_seed),
        resolved=resolved,
        inversion=find_inversion(attainments, target),
    )


# ---- throughputs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestRate:
    """The rate at which a throughput is highest."""

    per_seed: tuple[float, ...]  # the throughput there
    interval: metrics.Interval  # across seeds
    rate_rps: float
    bracketed: bool  # a lower rate tried is worse, and a higher one gains nothing


def best_rate(
    scores: Mapping[float, Sequence[float]],
    tolerance: float,
    *,
    independent: bool = True,
) -> BestRate:
    """Where the mean over seeds is highest; of equal ones, the lowest rate.

    Args:
      scores: rate -> throughput of each seed, the same seeds at each rate.
      tolerance: relative; what a higher rate gains less than this is no gain.
      independent: as in `estimate`.
    """
    means = {rate: statistics.mean(values) for rate, values in scores.items()}
    best = max(sorted(means), key=lambda rate: means[rate])
    return BestRate(
        per_seed=tuple(scores[best]),
        interval=metrics.rate_interval(scores[best], independent=independent),
        rate_rps=best,
        bracketed=min(means) < _knee(means, tolerance) < max(means),
    )


def _knee(means: Mapping[float, float], tolerance: float) -> float:
    """The lowest rate from which no higher one gains more than the tolerance.

    Throughput may level off with the rate, and there is no end of a plateau to find.
    """
    enough = max(means.values()) / (1 + tolerance)
    return min(rate for rate, mean in means.items() if mean >= enough)


def climb(evaluate: Evaluate, start_rps: float, plan: SearchPlan) -> None:
    """Evaluates rates around the highest throughput, until those beside it are near."""
    means: dict[float, float] = {}
    rate: float | None = start_rps
    while rate is not None and len(means) < plan.max_rates:
        means[rate] = statistics.mean(evaluate(rate))
        rate = _next_rate(means, plan)


def _next_rate(means: Mapping[float, float], plan: SearchPlan) -> float | None:
    """The next rate to try beside the best; None if both its neighbours are near."""
    rates = sorted(means)
    at = rates.index(_knee(means, plan.tolerance))
    if at == len(rates) - 1:
        return rates[at] * plan.growth
    if at == 0:
        return rates[at] / plan.growth
    for low, high in ((rates[at], rates[at + 1]), (rates[at - 1], rates[at])):
        if high > low * (1 + plan.tolerance):
            return math.sqrt(low * high)
    return None
