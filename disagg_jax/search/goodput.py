"""Goodput by simulation: the highest rate that attains.

A goodput may be by any criterion (`disagg_jax.metrics.criteria`). By DistServe's, runs
are cut short once their score is decided (`search/early_stop.py`). These remain exact:

* for every rate tried, whether the mean attainment over the seeds reaches the target,
  and whether each seed's own attainment does: so `pass_rps` and `fail_rps`, and between
  which of the rates tried each seed crosses the target;
* the attainments at `pass_rps` and `fail_rps` and of an `inversion`, whose runs are in
  full: so `resolved`, and the `per_seed_rps` of a seed that crosses between these two.

A seed that crosses elsewhere has a `per_seed_rps` between the right two rates, but
interpolated with the upper bound of a cut run: too high by less than the distance
between the rates.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
import sys
import warnings
from collections.abc import Sequence

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.criteria import Criterion, DistServe
from disagg_jax.metrics.goodput import GoodputEstimate, estimate
from disagg_jax.request import Request
from disagg_jax.search.capacity import capacity_rps, load_helps, unloaded
from disagg_jax.search.early_stop import (
    CutShortRun,
    RunScore,
    decisive_misses,
    score_run,
)
from disagg_jax.search.rates import SearchPlan, search
from disagg_jax.sim.run import RunLatencies, SimulationTask
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import Mapper
from disagg_jax.workload.workload import Workload

_SAMPLE = 200  # requests by which the capacity is estimated


class DependentSeedsWarning(UserWarning):
    """Warns that runs share rows of a trace, so their spread gives no interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputSearch:
    """A goodput to find. All deployments see equal requests at equal seeds.

    Raises:
      ValueError: on no requests, no seeds, or one seed twice.
    """

    simulated: SimulatedDeployment
    workload: Workload
    slo: SLO  # also gives the first rate to try, by any criterion
    criterion: Criterion | None = None  # None: DistServe's, by `slo` and `plan.target`
    num_requests: int = 1000  # of each run; goodputs of short runs are higher
    seeds: tuple[int, ...] = (0,)
    plan: SearchPlan = SearchPlan(growth=1.25, tolerance=0.05, max_rates=30)
    start_rps: float | None = None  # the first rate; by default near the capacity
    # A goodput below this rate is of no interest: if the rate fails, no other is tried,
    # unless attainment may rise with the rate (`may_rise`).
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
        """Say why the runs give no interval; '' if they are independent samples."""
        return self.workload.why_dependent(self.num_requests, self.seeds)

    @property
    def good(self) -> Criterion:
        """Return the criterion that scores the runs."""
        return self.criterion or DistServe(slo=self.slo, target=self.plan.target)

    def points(self, rate_rps: float) -> list[SimulationTask]:
        """Return a run for each seed."""
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
        """Return the first rate to try."""
        if self.must_beat_rps is not None:
            return self.must_beat_rps
        if self.start_rps is not None:
            return self.start_rps
        capacity = self.capacity_rps()
        return 0.8 * capacity if capacity < math.inf else 1.0

    def capacity_rps(self) -> float:
        """Estimate the capacity of the deployment; inf if no step takes time."""
        return capacity_rps(self.simulated, self._sample(), self.slo)

    def may_rise(self) -> bool:
        """Return whether low rates may be served worse than high ones."""
        return load_helps(self.simulated, self._sample())

    def _sample(self) -> list[Request]:
        sample = min(self.num_requests, _SAMPLE)
        return self.workload.requests(sample, 1.0, self.seeds[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimGoodput:
    """The goodput of a whole deployment, in requests/s.

    If no rate passed, `found.pass_rps` is None and the goodput is below
    `found.fail_rps`. If `unloaded_scale` is above 1 there is no goodput: one request
    alone is too slow, and nothing was simulated.
    """

    found: GoodputEstimate
    steady: bool  # at `pass_rps`, every seed
    num_requests: int  # of each run
    seeds: tuple[int, ...]
    runs: int  # that were simulated
    unloaded_scale: float  # the SLO scale that requests would need one at a time

    @property
    def rps(self) -> float:
        """Return the mean over seeds."""
        return self.found.interval.mean

    def __str__(self) -> str:
        """Return the goodput with its interval, and how far it can be trusted."""
        seeds = "1 seed" if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"
        runs = f"{seeds} of {self.num_requests} requests"
        if self.unloaded_scale > 1 and not self.runs:
            return (
                f"no goodput: even alone it needs {self.unloaded_scale:.3g} x the SLO"
            )
        if self.found.pass_rps is None:
            return f"goodput below {self.found.fail_rps:.4g} requests/s ({runs})"
        mean, low, high = dataclasses.astuple(self.found.interval)
        known = (
            "no interval" if low is None else f"95 % interval {low:.4g} to {high:.4g}"
        )
        resolved = "resolved" if self.found.resolved else "not resolved"
        steady = "" if self.steady else ", not steady"
        return f"goodput {mean:.4g} requests/s, {known} ({runs}, {resolved}{steady})"


class _Runs:
    """The runs of a search, by rate."""

    def __init__(self, asked: GoodputSearch, mapper: Mapper, cut_at: int):
        self._asked, self._mapper, self._cut_at = asked, mapper, cut_at
        self.by_rate: dict[float, list[RunScore]] = {}
        self.count = 0

    def scores(self, rate_rps: float) -> list[float]:
        """Return the score of each seed; of a cut run, an upper bound."""
        if rate_rps not in self.by_rate:
            points = self._asked.points(rate_rps)
            self.by_rate[rate_rps] = self._run(points, self._cut_at)
        return [run.score for run in self.by_rate[rate_rps]]

    def all_scores(self) -> dict[float, list[float]]:
        """Return the scores of every rate so far."""
        return {rate: self.scores(rate) for rate in self.by_rate}

    def complete(self, rate_rps: float) -> None:
        """Run the cut runs of a rate in full."""
        scores = self.by_rate[rate_rps]
        cut = [i for i, score in enumerate(scores) if score.cut]
        points = self._asked.points(rate_rps)
        never = self._asked.num_requests + 1  # more misses than there are requests
        full = self._run([points[i] for i in cut], never)
        for i, score in zip(cut, full, strict=True):
            scores[i] = score

    def _run(self, points: Sequence[SimulationTask], cut_at: int) -> list[RunScore]:
        self.count += len(points)
        good = self._asked.good
        runs = [
            CutShortRun(point=point, criterion=good, cut_at_misses=cut_at)
            for point in points
        ]
        return list(self._mapper(score_run, runs))


def find_goodput(asked: GoodputSearch, mapper: Mapper = map) -> SimGoodput:
    """Search the goodput of a deployment.

    Args:
      mapper: runs the seeds of a rate, see `sim/workers.py`.

    Raises:
      ValueError: if the criterion is a throughput.
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
    passing = runs.by_rate.get(found.pass_rps or 0.0, [])
    return SimGoodput(
        found=found,
        steady=bool(passing) and all(run.steady for run in passing),
        num_requests=asked.num_requests,
        seeds=asked.seeds,
        runs=runs.count,
        unloaded_scale=scale,
    )


def _independent(asked: GoodputSearch) -> bool:
    """Return whether the seeds' runs give intervals; warn if not."""
    why = asked.why_dependent
    if why:
        warnings.warn(f"no interval: {why}", DependentSeedsWarning, stacklevel=3)
    return not why


def unloaded_scale(asked: GoodputSearch) -> float:
    """Return the SLO scale needed if every request found the deployment empty.

    It is 0 for criteria other than DistServe's, whose bounds have no such scale.
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


def slo_scale(results: Sequence[RunLatencies], slo: SLO, target: float) -> float:
    """Return the smallest factor on `slo` at which the mean attainment passes.

    Small is good: DistServe (OSDI'24, Figs. 8 and 9) reads its plots from right to
    left. Attainment changes only where the factor reaches max(ttft / target ttft, tpot
    / target tpot) of a request, so these factors are bisected, and the answer is exact.

    Returns:
      inf if no factor passes: too few requests finished.
    """
    latencies = (zip(r.ttft_s, r.tpot_s, strict=True) for r in results)
    factors = sorted({_covering(*both, slo) for run in latencies for both in run})

    def passes(factor: float) -> bool:
        scaled = slo.scaled(factor)
        return statistics.mean(r.attainment(scaled).joint for r in results) >= target

    at = bisect.bisect_left(factors, True, key=passes)
    return factors[at] if at < len(factors) else math.inf


def _covering(ttft_s: float, tpot_s: float, slo: SLO) -> float:
    """Return the smallest factor, to a rounding, at which such a request is good."""
    ratio = max(ttft_s / slo.ttft_s, tpot_s / slo.tpot_s, sys.float_info.min)
    # Rounding: at most a step or two.
    while ttft_s > slo.ttft_s * ratio or tpot_s > slo.tpot_s * ratio:
        ratio = math.nextafter(ratio, math.inf)
    return ratio
