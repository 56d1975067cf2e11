"""Goodput by simulation: the highest rate, or the smallest SLO scale, that attains.

A goodput may be by any criterion (`disagg_jax.metrics.criteria`). By DistServe's, runs
are cut short once they are decided (`search/early_stop.py`), but what is exact
nevertheless:

* for every rate tried, whether the mean attainment over the seeds reaches the target,
  and whether each seed's own does: so `pass_rps` and `fail_rps`, and between which of
  the rates tried each seed crosses the target;
* the attainments at `pass_rps` and `fail_rps`, which are run in full: so `resolved`,
  and where a seed crosses between these two, its `per_seed_rps`; and those of an
  `inversion`.

A seed that crosses elsewhere has a `per_seed_rps` between the right two rates, but
interpolated with the upper bound that a cut run gives: too high by less than their
distance.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import statistics
import sys
import warnings
from collections.abc import Sequence

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import Criterion, DistServe
from disagg_jax.request import Request
from disagg_jax.search.capacity import capacity_rps, load_helps, unloaded
from disagg_jax.search.early_stop import Trial, Verdict, decisive_misses, run_trial
from disagg_jax.search.rates import (
    BestRate,
    GoodputEstimate,
    SearchPlan,
    best_rate,
    climb,
    estimate,
    search,
)
from disagg_jax.sim.run import RunLatencies, SimulationTask, run_task
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import Mapper
from disagg_jax.workload import Workload

_SAMPLE = 200  # requests by which the capacity is estimated


class DependentSeedsWarning(UserWarning):
    """Runs share rows of a trace, so that their spread gives no interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputSearch:
    """What to look for. All deployments see equal requests at equal seeds.

    Raises:
      ValueError: on no requests, no seeds, or one seed twice.
    """

    simulated: SimulatedDeployment
    workload: Workload
    slo: SLO  # also says about where to begin, by whatever criterion
    criterion: Criterion | None = None  # None: DistServe's, by `slo` and `plan.target`
    num_requests: int = 1000  # of each run; goodputs of short runs are higher
    seeds: tuple[int, ...] = (0,)
    plan: SearchPlan = SearchPlan(growth=1.25, tolerance=0.05, max_rates=30)
    start_rps: float | None = None  # the first rate; by default near the capacity
    # A goodput below it is of no interest: if it fails, nothing else is tried, unless
    # attainment may rise with the rate (`may_rise`).
    must_beat_rps: float | None = None

    def __post_init__(self) -> None:
        require(
            self.num_requests >= 1, "num_requests: expected >= 1", self.num_requests
        )
        require(len(self.seeds) >= 1, "seeds: expected at least one", self.seeds)
        different = len(set(self.seeds)) == len(self.seeds)
        require(different, "seeds: expected different ones", self.seeds)

    @property
    def why_dependent(self) -> str:
        """Why the seeds' runs give no interval; '' if they are independent samples."""
        return self.workload.why_dependent(self.num_requests, self.seeds)

    @property
    def good(self) -> Criterion:
        """The criterion that runs are scored by."""
        return self.criterion or DistServe(slo=self.slo, target=self.plan.target)

    def points(self, rate_rps: float) -> list[SimulationTask]:
        """A run for each seed."""
        return [
            SimulationTask(
                simulated=self.simulated,
                workload=self.workload,
                rate_rps=rate_rps,
                num_requests=self.num_requests,
                seed=seed,
            )
            for seed in self.seeds
        ]

    def first_rps(self) -> float:
        """The first rate to try."""
        if self.must_beat_rps is not None:
            return self.must_beat_rps
        if self.start_rps is not None:
            return self.start_rps
        capacity = self.capacity_rps()
        return 0.8 * capacity if capacity < math.inf else 1.0

    def capacity_rps(self) -> float:
        """An estimate of what the deployment can serve; inf if nothing takes time."""
        return capacity_rps(self.simulated, self._sample(), self.slo)

    def may_rise(self) -> bool:
        """Whether low rates may be served worse than high ones."""
        return load_helps(self.simulated, self._sample())

    def _sample(self) -> list[Request]:
        sample = min(self.num_requests, _SAMPLE)
        return self.workload.requests(sample, 1.0, self.seeds[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimGoodput:
    """A deployment's goodput, in requests/s of all of it.

    Where not even the lowest rate passed, `found.pass_rps` is None and the goodput is
    below `found.fail_rps`. Where `unloaded_scale` is above 1 there is none at all: one
    request alone is too slow, and nothing was simulated.
    """

    found: GoodputEstimate
    steady: bool  # at `pass_rps`, every seed
    num_requests: int  # of each run
    seeds: tuple[int, ...]
    runs: int  # that were simulated
    unloaded_scale: float  # the SLO scale that requests would need one at a time

    @property
    def rps(self) -> float:
        """The mean over seeds."""
        return self.found.interval.mean


class _Runs:
    """The runs of a search, by rate."""

    def __init__(self, asked: GoodputSearch, mapper: Mapper, cut_at: int):
        self._asked, self._mapper, self._cut_at = asked, mapper, cut_at
        self.verdicts: dict[float, list[Verdict]] = {}
        self.count = 0

    def scores(self, rate_rps: float) -> list[float]:
        """Of each seed, as far as it is needed."""
        if rate_rps not in self.verdicts:
            points = self._asked.points(rate_rps)
            self.verdicts[rate_rps] = self._run(points, self._cut_at)
        return [verdict.score for verdict in self.verdicts[rate_rps]]

    def all_scores(self) -> dict[float, list[float]]:
        """Of every rate so far."""
        return {rate: self.scores(rate) for rate in self.verdicts}

    def complete(self, rate_rps: float) -> None:
        """Runs in full what was cut."""
        verdicts = self.verdicts[rate_rps]
        cut = [i for i, verdict in enumerate(verdicts) if verdict.cut]
        points = self._asked.points(rate_rps)
        full = self._run([points[i] for i in cut], _never(self._asked))
        for i, verdict in zip(cut, full, strict=True):
            verdicts[i] = verdict

    def _run(self, points: Sequence[SimulationTask], cut_at: int) -> list[Verdict]:
        self.count += len(points)
        good = self._asked.good
        trials = [Trial(point=p, criterion=good, cut_at_misses=cut_at) for p in points]
        return list(self._mapper(run_trial, trials))


def _never(asked: GoodputSearch) -> int:
    """More misses than there can be."""
    return asked.num_requests + 1


def find_goodput(asked: GoodputSearch, mapper: Mapper = map) -> SimGoodput:
    """Searches the goodput of a deployment.

    Args:
      mapper: runs the seeds of a rate, see `sim/workers.py`.

    Raises:
      ValueError: if the criterion is a throughput; see `find_throughput`.
    """
    target = asked.good.target
    if target is None:
        raise ValueError(
            f"criterion: expected one with a target for find_goodput, got {asked.good}"
        )
    independent = _independent(asked)
    scale = unloaded_scale(asked)
    if scale > 1 and not asked.may_rise():
        return _no_goodput(asked, scale)
    cut_at = decisive_misses(asked.num_requests, len(asked.seeds), target)
    runs = _Runs(asked, mapper, cut_at)
    first = asked.first_rps()
    beats = asked.must_beat_rps is None or statistics.mean(runs.scores(first)) >= target
    if beats or asked.may_rise():
        search(runs.scores, first, dataclasses.replace(asked.plan, target=target))
        _complete_bracket(runs, target)
    found = estimate(runs.all_scores(), target, independent=independent)
    passing = runs.verdicts.get(found.pass_rps or 0.0, [])
    return SimGoodput(
        found=found,
        steady=bool(passing) and all(verdict.steady for verdict in passing),
        num_requests=asked.num_requests,
        seeds=asked.seeds,
        runs=runs.count,
        unloaded_scale=scale,
    )


def find_throughput(asked: GoodputSearch, mapper: Mapper = map) -> BestRate:
    """Searches the rate at which the score is highest: for criteria without a target.

    Every run is simulated in full.
    """
    runs = _Runs(asked, mapper, cut_at=_never(asked))
    climb(runs.scores, asked.first_rps(), asked.plan)
    independent = _independent(asked)
    return best_rate(runs.all_scores(), asked.plan.tolerance, independent=independent)


def _independent(asked: GoodputSearch) -> bool:
    """Whether the seeds' runs give intervals; warns if not."""
    why = asked.why_dependent
    if why:
        warnings.warn(f"no interval: {why}", DependentSeedsWarning, stacklevel=3)
    return not why


def unloaded_scale(asked: GoodputSearch) -> float:
    """The SLO scale needed if every request found the deployment empty.

    0 for other criteria than DistServe's: what they bound has no such scale.
    """
    good, n = asked.good, asked.num_requests
    if not isinstance(good, DistServe):
        return 0.0
    alone = [
        unloaded(asked.simulated, asked.workload.requests(n, 1.0, seed))
        for seed in asked.seeds
    ]
    return slo_scale(alone, good.slo, good.target)


def _no_goodput(asked: GoodputSearch, scale: float) -> SimGoodput:
    zeros = (0.0,) * len(asked.seeds)
    found = GoodputEstimate(
        per_seed_rps=zeros,
        interval=metrics.rate_interval(zeros, independent=not asked.why_dependent),
        pass_rps=None,
        fail_rps=None,
        bracketed=False,
        resolved=not asked.why_dependent,
    )
    return SimGoodput(
        found=found,
        steady=False,
        num_requests=asked.num_requests,
        seeds=asked.seeds,
        runs=0,
        unloaded_scale=scale,
    )


def _complete_bracket(runs: _Runs, target: float) -> None:
    found = estimate(runs.all_scores(), target)
    if found.pass_rps is not None:
        below = found.inversion and found.inversion.fail_rps
        for rate in (found.pass_rps, found.fail_rps, below):
            if rate is not None:
                runs.complete(rate)


# ---- SLO scale -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SloScale:
    """The smallest factor on both targets whose attainment reaches the target.

    Small is good: DistServe (OSDI'24, Figs. 8 and 9) reads it from right to left.
    """

    factor: float  # by the mean attainment over seeds; inf if too few finished
    per_seed: tuple[float, ...]
    interval: metrics.Interval | None  # across seeds; None if one is infinite
    steady: bool  # every seed
    rate_rps: float
    num_requests: int
    seeds: tuple[int, ...]


def find_slo_scale(
    asked: GoodputSearch, rate_rps: float, mapper: Mapper = map
) -> SloScale:
    """Simulates each seed once at `rate_rps`, in full, and reads off the SLO scale."""
    results = list(mapper(run_task, asked.points(rate_rps)))
    target = asked.plan.target
    per_seed = tuple(slo_scale([result], asked.slo, target) for result in results)
    finite = max(per_seed) < math.inf
    return SloScale(
        factor=slo_scale(results, asked.slo, target),
        per_seed=per_seed,
        interval=metrics.rate_interval(per_seed, independent=_independent(asked))
        if finite
        else None,
        steady=all(result.steady for result in results),
        rate_rps=rate_rps,
        num_requests=asked.num_requests,
        seeds=asked.seeds,
    )


def slo_scale(results: Sequence[RunLatencies], slo: SLO, target: float) -> float:
    """The smallest factor f for which the mean attainment at `slo.scaled(f)` passes.

    Attainment changes only where f reaches a request's max(ttft / target ttft, tpot /
    target tpot), so these factors are bisected, and the answer is exact.

    Returns:
      inf if it does not pass at any factor: too few requests finished.
    """
    factors = sorted({f for result in results for f in _factors(result, slo)})

    def passes(factor: float) -> bool:
        scaled = slo.scaled(factor)
        return statistics.mean(r.attainment(scaled).joint for r in results) >= target

    at = bisect.bisect_left(factors, True, key=passes)
    return factors[at] if at < len(factors) else math.inf


def _factors(result: RunLatencies, slo: SLO) -> list[float]:
    latencies = zip(result.ttft_s, result.tpot_s, strict=True)
    return [_covering(ttft, tpot, slo) for ttft, tpot in latencies]


def _covering(ttft_s: float, tpot_s: float, slo: SLO) -> float:
    """The smallest factor, to a rounding, at which a request so slow is good."""
    ratio = max(ttft_s / slo.ttft_s, tpot_s / slo.tpot_s, sys.float_info.min)
    good = functools.partial(_is_good, ttft_s, tpot_s, slo)
    while not good(ratio):  # rounding: at most a step or two
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _is_good(ttft_s: float, tpot_s: float, slo: SLO, factor: float) -> bool:
    return ttft_s <= slo.ttft_s * factor and tpot_s <= slo.tpot_s * factor
