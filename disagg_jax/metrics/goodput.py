"""Goodput: the highest rate that attains a target, by one seed's runs or by all seeds'.

Every rate is tried with every seed, and all systems see the same arrivals and lengths
at the same seed (common random numbers), so ratios can be paired by seed.
`disagg_jax.search.rates` chooses which rates to try.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

from disagg_jax.metrics.intervals import Interval, rate_interval

Scores = Mapping[float, Sequence[float]]  # rate in requests/s -> score of each seed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """The highest rate of one seed that attains the target, and its two neighbours."""

    rate_rps: float  # per device if the given rates were; 0 if the lowest rate failed
    pass_rps: float | None  # highest passing rate below the first failure
    fail_rps: float | None  # lowest failing rate

    @property
    def bracketed(self) -> bool:
        """Return whether a pass and a failure were both seen.

        Otherwise `rate_rps` is a lower bound: the sweep was too high or too low.
        """
        return self.pass_rps is not None and self.fail_rps is not None


def goodput(points: Iterable[tuple[float, float]], target: float = 0.9) -> Goodput:
    """Return the first crossing of `target` by attainment over rate, for one seed.

    `points` are (rate_rps, attainment) in any order. Going up in rate, the first point
    below the target ends the search: a later pass is luck, since a higher rate cannot
    be served better, and counting it would reward trying many rates. This biases the
    goodput downwards where attainment is noisy near the target and the grid is fine;
    longer runs reduce the bias, and the interval over seeds shows it. Between the last
    pass and the first failure the rate is interpolated linearly, as in DistServe's
    plots.

    Raises:
      ValueError: on no points, a rate given twice or not > 0, an attainment outside
        [0, 1], or a target outside (0, 1].
    """
    ordered = sorted(points)
    _check_points(ordered, target)
    passed: tuple[float, float] | None = None
    for rate, share in ordered:
        if share < target:
            return _interpolated(passed, (rate, share), target)
        passed = (rate, share)
    assert passed is not None  # there is a point, and none failed
    return Goodput(rate_rps=passed[0], pass_rps=passed[0], fail_rps=None)


def _interpolated(
    passed: tuple[float, float] | None, failed: tuple[float, float], target: float
) -> Goodput:
    if passed is None:
        return Goodput(rate_rps=0.0, pass_rps=None, fail_rps=failed[0])
    (pass_rps, high), (fail_rps, low) = passed, failed
    rate = pass_rps + (fail_rps - pass_rps) * (high - target) / (high - low)
    return Goodput(rate_rps=rate, pass_rps=pass_rps, fail_rps=fail_rps)


def _check_points(points: Sequence[tuple[float, float]], target: float) -> None:
    if not points:
        raise ValueError("goodput: expected at least one (rate, attainment), got none")
    if not 0 < target <= 1:
        raise ValueError(f"target: expected in (0, 1], got {target}")
    for rate, share in points:
        if not rate > 0 or not 0 <= share <= 1:
            raise ValueError(
                f"goodput: expected rate > 0 and attainment in [0, 1], "
                f"got ({rate}, {share})"
            )
    for (rate, _), (after, _) in itertools.pairwise(points):
        if rate == after:
            raise ValueError(f"goodput: expected each rate once, got {rate} twice")


def is_resolved(at_pass: Interval, at_fail: Interval, target: float = 0.9) -> bool:
    """Return whether the runs were long and many enough to decide a goodput.

    They were if the interval at the highest passing rate lies at or above the target,
    and the interval at the lowest failing rate below it. An unknown interval gives
    False.
    """
    if at_pass.low is None or at_fail.high is None:
        return False
    return at_pass.low >= target > at_fail.high


# ---- over seeds ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputEstimate:
    """A system's goodput, in requests/s of the whole deployment."""

    per_seed_rps: tuple[float, ...]  # each seed's own crossing of the target
    interval: Interval  # across seeds
    pass_rps: float | None  # highest rate tried at which the mean attainment passes
    fail_rps: float | None  # the rate above it, at which it fails
    bracketed: bool  # both ends were seen for every seed
    # Whether a rate that passes and one that fails are known, near to one another: the
    # interval at each lies on its side of the target. See `estimate`.
    resolved: bool
    # Where attainment is not monotone in the rate. The goodput is then read off the
    # lowest passing rate and the rates that pass in a row above it.
    inversion: Inversion | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inversion:
    """A rate at which the mean attainment fails, though it passes at a higher one."""

    fail_rps: float
    fail_score: float
    pass_rps: float  # the next one that passes
    pass_score: float

    def text(self, devices: float = 1.0) -> str:
        """Describe the inversion, in rates per device."""
        return (
            "attainment is not monotone in the rate: "
            f"{self.fail_score:.1%} at {self.fail_rps / devices:.4g} requests/s per "
            f"device, {self.pass_score:.1%} at {self.pass_rps / devices:.4g}"
        )


def find_inversion(attainments: Scores, target: float) -> Inversion | None:
    """Return the clearest failure below a passing rate; None if there is none.

    Low rates can be served worse than high ones where a small batch takes longer than a
    large one. An inversion may also be luck: attainments of few requests, near the
    target.
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


def bracket(tried: Scores, target: float) -> tuple[float, float | None]:
    """Return the highest passing and the lowest failing rate, by the mean over seeds.

    The passing rate is 0 if no rate passes, the failing rate None if no rate fails.
    """
    points = [(rate, statistics.mean(values)) for rate, values in tried.items()]
    found = _crossing(points, target)
    return found.pass_rps or 0.0, found.fail_rps


def _crossing(points: Sequence[tuple[float, float]], target: float) -> Goodput:
    """Return the first crossing of the target above the lowest passing rate."""
    lowest = min((rate for rate, share in points if share >= target), default=0.0)
    return goodput([point for point in points if point[0] >= lowest], target)


def estimate(
    attainments: Scores,
    target: float,
    *,
    independent: bool = True,
    confidence: float = 0.95,
    apart: float = 1.0,
) -> GoodputEstimate:
    """Estimate the goodput from the attainments at the rates that were tried.

    Args:
      attainments: rate -> joint attainment of each seed, the same seeds at each rate.
      independent: whether the seeds' runs are independent samples; if not, there is no
        interval, and the goodput is not resolved.
      confidence: of all intervals.
      apart: a goodput is resolved if its highest passing and lowest failing rate are
        decided. If they are too near to it for that, so are two other rates around
        them, of which the higher is at most this many times the lower.
    """
    seeds = len(next(iter(attainments.values())))
    per_seed = [
        _crossing([(r, values[i]) for r, values in attainments.items()], target)
        for i in range(seeds)
    ]
    passing, failing = bracket(attainments, target)

    def of(values: Sequence[float]) -> Interval:
        return rate_interval(values, independent=independent, confidence=confidence)

    rates = tuple(found.rate_rps for found in per_seed)
    return GoodputEstimate(
        per_seed_rps=rates,
        interval=of(rates),
        pass_rps=passing or None,
        fail_rps=failing,
        bracketed=all(found.bracketed and found.rate_rps > 0 for found in per_seed),
        resolved=any(
            is_resolved(of(attainments[low]), of(attainments[high]), target)
            for low, high in _ends(attainments, passing, failing, apart)
        ),
        inversion=find_inversion(attainments, target),
    )


def _ends(
    rates: Iterable[float], passing: float, failing: float | None, apart: float
) -> list[tuple[float, float]]:
    """Return the bracket, and pairs of rates around it that are not far `apart`."""
    if not passing or failing is None:
        return []
    lower = [rate for rate in rates if rate <= passing]
    higher = [rate for rate in rates if rate >= failing]
    pairs = itertools.product(lower, higher)
    near = [(low, high) for low, high in pairs if high <= apart * low]
    return [(passing, failing), *near]


# ---- throughputs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestRate:
    """The rate at which a throughput is highest."""

    per_seed: tuple[float, ...]  # the throughput there
    interval: Interval  # across seeds
    rate_rps: float
    bracketed: bool  # a lower rate tried is worse, and a higher one gains nothing


def best_rate(
    scores: Scores,
    tolerance: float,
    *,
    independent: bool = True,
) -> BestRate:
    """Return the rate with the highest mean throughput; of equal ones the lowest rate.

    Args:
      scores: rate -> throughput of each seed, the same seeds at each rate.
      tolerance: relative; a higher rate that gains less than this gains nothing.
      independent: as in `estimate`.
    """
    means = {rate: statistics.mean(values) for rate, values in scores.items()}
    best = max(sorted(means), key=lambda rate: means[rate])
    return BestRate(
        per_seed=tuple(scores[best]),
        interval=rate_interval(scores[best], independent=independent),
        rate_rps=best,
        bracketed=min(means) < knee(means, tolerance) < max(means),
    )


def knee(means: Mapping[float, float], tolerance: float) -> float:
    """Return the lowest rate above which no rate gains more than the tolerance.

    Throughput may level off with the rate, and a plateau has no end to find.
    """
    enough = max(means.values()) / (1 + tolerance)
    return min(rate for rate, mean in means.items() if mean >= enough)
