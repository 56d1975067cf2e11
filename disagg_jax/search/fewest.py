"""The fewest devices on which a system serves a rate within its targets.

Whole deployments are simulated at the rate itself: a trace from its first row to its
last, with its own gaps. An estimate only says where to begin: the capacity of each
layout that a comparison searched, times the share of it that its goodput was there.
From there the number of devices goes up or down, by larger and larger steps, until a
number that serves the rate is next to one that does not. Fewer devices than could serve
it by their capacity, with a margin, are not tried.

Of each number only the few most promising deployments are tried, and a number is taken
to fail if they do, so there may be a better deployment that nobody looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from disagg_jax.deployment import Deployment, Parallelism, Role
from disagg_jax.errors import require
from disagg_jax.metrics.criteria import DistServe
from disagg_jax.metrics.summary import percentiles
from disagg_jax.search.capacity import capacity_rps, phase_capacities_rps
from disagg_jax.search.comparison import (
    CAPACITY_MARGIN,
    ComparisonSpec,
    SystemResult,
    SystemSearch,
    simulate,
)
from disagg_jax.search.early_stop import CutShortRun, decisive_misses, watch_run
from disagg_jax.search.maps import Cell
from disagg_jax.search.placement import colocated_instances, pair
from disagg_jax.sim.run import RunLatencies, SimulationTask
from disagg_jax.workload.workload import TraceWorkload

_TRIED = 3  # deployments of a number of devices, the most promising first
_SAMPLE = 200  # requests that capacities are estimated from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """A rate to serve, and the runs that show whether it is served.

    Raises:
      ValueError: on a rate or a number of devices that is not above 0.
    """

    rate_rps: float
    num_requests: int  # of a run
    seeds: tuple[int, ...]
    max_devices: int = 64

    def __post_init__(self) -> None:
        finite = 0 < self.rate_rps < math.inf
        require(finite, "rate: expected > 0 requests/s, and finite", self.rate_rps)
        most = self.max_devices
        require(most >= 1, "max_devices: expected >= 1", most)

    @classmethod
    def of(
        cls, cell: Cell, rate_rps: float, search: SystemSearch, max_devices: int
    ) -> Demand:
        """Return the whole of a trace once, or as many requests as in a search."""
        known = search.options[0].candidate.search
        num_requests, seeds = known.num_requests, known.seeds
        if isinstance(cell.workload, TraceWorkload):
            num_requests, seeds = len(cell.workload.rows), (0,)
        return cls(
            rate_rps=rate_rps,
            num_requests=num_requests,
            seeds=seeds,
            max_devices=max_devices,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One instance of each role of a system, and what it may serve.

    Attributes:
      tp: of a colocated instance, or of a prefill and a decode instance.
      capacity_rps: of an instance of each.
      share: of its capacity that is its goodput, where that was searched.
    """

    tp: tuple[int, ...]
    capacity_rps: tuple[float, ...]
    share: float = 1.0

    def deployments(self, devices: int) -> Iterator[tuple[float, Deployment]]:
        """Yield the deployments of so many devices, each after its capacity."""
        if len(self.tp) == 1:
            (tp,), (rps,) = self.tp, self.capacity_rps
            if devices % tp == 0:
                count = devices // tp
                yield count * rps, colocated_instances(Parallelism(tp), count)
            return
        p, d = self.tp
        for n in range(1, (devices - d) // p + 1):
            m, left = divmod(devices - n * p, d)
            if left == 0:
                rps = min(n * self.capacity_rps[0], m * self.capacity_rps[1])
                yield rps, pair(Parallelism(p), Parallelism(d), n, m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewestSearch:
    """The fewest devices to find for one system; a task for a worker."""

    spec: ComparisonSpec
    cell: Cell
    system: str
    size: int | None  # of a step in tokens, where it was given
    units: tuple[Unit, ...]
    demand: Demand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A deployment at the rate in question."""

    devices: int
    deployment: str
    attainment: float  # an upper bound if the runs were cut short as they failed
    served: bool
    ttft_s: dict[str, float | None] = dataclasses.field(
        default_factory=dict[str, float | None]
    )
    tpot_s: dict[str, float | None] = dataclasses.field(
        default_factory=dict[str, float | None]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewestDevices:
    """The answer for one system.

    Attributes:
      best: on the fewest devices that serve the rate; None if no number up to the
        maximum does.
      bound: devices below which it cannot, by capacity; None if no number can.
      least: devices of the smallest deployment that there is.
      trials: all that was simulated.
    """

    system: str
    best: Trial | None
    bound: int | None
    least: int
    trials: tuple[Trial, ...] = ()

    def __str__(self) -> str:
        """Return the system and its number of devices."""
        return f"{self.system}: {self.best.devices if self.best else 'none'}"

    @property
    def below(self) -> Trial | None:
        """Return the best trial of those on fewer devices than `best`."""
        most = self.best.devices if self.best else math.inf
        fewer = [trial for trial in self.trials if trial.devices < most]
        return max(fewer, key=lambda t: (t.devices, t.attainment), default=None)


def fewest_search(
    spec: ComparisonSpec,
    cell: Cell,
    demand: Demand,
    search: SystemSearch,
    result: SystemResult,
) -> FewestSearch:
    """Return the search of a system, from what a comparison found of it."""
    return FewestSearch(
        spec=spec,
        cell=cell,
        system=search.system,
        size=search.option(result.deployment).size,
        units=_units(spec, cell, search, result),
        demand=demand,
    )


def _units(
    spec: ComparisonSpec, cell: Cell, search: SystemSearch, result: SystemResult
) -> tuple[Unit, ...]:
    """Return the layouts that meet the targets, by the best of their goodputs."""
    shares: dict[tuple[int, ...], float] = {}
    for row in result.candidates:
        if str(row.get("why", "")).startswith("alone"):
            continue
        candidate = search.option(row["candidate"]).candidate
        instances = candidate.search.simulated.deployment.instances
        tp = tuple(
            i.parallelism.tp for i in (instances[0], instances[-1])[: _roles(search)]
        )
        goodput = row["at_most"] if row["goodput"] is None else row["goodput"]
        share, bound_rps = CAPACITY_MARGIN, candidate.bound_rps
        if bound_rps < math.inf:
            share *= min(1.0, goodput * candidate.devices / bound_rps)
        shares[tp] = max(shares.get(tp, 0.0), share)
    size = search.option(result.deployment).size
    return tuple(
        Unit(
            tp=tp,
            capacity_rps=_unit_capacity_rps(spec, cell, search.system, tp, size),
            share=share,
        )
        for tp, share in shares.items()
    )


def _roles(search: SystemSearch) -> int:
    deployment = search.options[0].candidate.search.simulated.deployment
    return 1 if deployment.of(Role.COLOCATED) else 2


def _unit_capacity_rps(
    spec: ComparisonSpec, cell: Cell, system: str, tp: tuple[int, ...], size: int | None
) -> tuple[float, ...]:
    sample = cell.workload.requests(_SAMPLE, 1.0, 0)
    first, last = Parallelism(tp[0]), Parallelism(tp[-1])
    if len(tp) == 1:
        unit = colocated_instances(first)
        simulated, _ = simulate(spec, cell, system, unit, size)
        return (capacity_rps(simulated, sample, cell.slo),)
    simulated, _ = simulate(spec, cell, system, pair(first, last), size)
    return phase_capacities_rps(simulated, sample, cell.slo)


def fewest_devices(task: FewestSearch) -> FewestDevices:
    """Find the fewest devices on which a system serves the rate."""
    demand = task.demand
    known = {
        devices: ranked
        for devices in range(1, demand.max_devices + 1)
        if (ranked := _ranked(task.units, devices))
    }
    sizes = list(known)
    able = [
        devices
        for devices in sizes
        if CAPACITY_MARGIN * max(each.capacity_rps for each in known[devices])
        >= demand.rate_rps
    ]
    if not able:
        least = min(sizes, default=0)
        return FewestDevices(system=task.system, best=None, bound=None, least=least)
    trials: dict[int, list[Trial]] = {}

    def serves(at: int) -> bool:
        devices = able[at]
        trials[devices] = list(_try(task, devices, known[devices]))
        return trials[devices][-1].served

    promising = (
        at
        for at, devices in enumerate(able)
        if known[devices][0].promise_rps >= demand.rate_rps
    )
    at = lowest(serves, next(promising, len(able) - 1), len(able))
    return FewestDevices(
        system=task.system,
        best=None if at is None else trials[able[at]][-1],
        bound=able[0],
        least=sizes[0],
        trials=tuple(itertools.chain(*trials.values())),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ranked:
    promise_rps: float  # the estimate of its goodput
    capacity_rps: float
    deployment: Deployment


def _ranked(units: Sequence[Unit], devices: int) -> list[_Ranked]:
    """Return the deployments of so many devices, the most promising first."""
    found = [
        _Ranked(promise_rps=unit.share * rps, capacity_rps=rps, deployment=deployment)
        for unit in units
        for rps, deployment in unit.deployments(devices)
    ]
    return sorted(found, key=lambda each: -each.promise_rps)


def lowest(passes: Callable[[int], bool], start: int, count: int) -> int | None:
    """Return the lowest of 0 to `count` - 1 that passes, if all above it pass too.

    It goes away from `start` by steps of 1, 2, 4, ... until it knows a pass and a
    failure, then bisects. None if the highest fails.
    """
    failed, passed, at, step = -1, count, start, 1
    while passed - failed > 1:
        if passes(at):
            passed = at
        else:
            failed = at
        if passed == count:
            at = min(count - 1, failed + step)
        elif failed == -1:
            at = max(0, passed - step)
        else:
            at = (passed + failed) // 2
        step *= 2
    return passed if passed < count else None


def _try(
    task: FewestSearch, devices: int, ranked: Sequence[_Ranked]
) -> Iterator[Trial]:
    """Yield the trials of a number of devices, up to one that serves the rate."""
    for each in ranked[:_TRIED]:
        trial = _trial(task, devices, each.deployment)
        yield trial
        if trial.served:
            return


def _trial(task: FewestSearch, devices: int, deployment: Deployment) -> Trial:
    """Simulate a whole deployment at the rate."""
    simulated, _ = simulate(task.spec, task.cell, task.system, deployment, task.size)
    demand, target = task.demand, task.spec.plan.target
    seeds, num_requests = demand.seeds, demand.num_requests
    runs = [
        watch_run(
            CutShortRun(
                point=SimulationTask(
                    simulated=simulated,
                    workload=task.cell.workload,
                    rate_rps=demand.rate_rps,
                    num_requests=num_requests,
                    seed=seed,
                ),
                criterion=DistServe(slo=task.cell.slo, target=target),
                cut_at_misses=decisive_misses(num_requests, len(seeds), target),
            )
        )
        for seed in seeds
    ]
    share = statistics.fmean(score.score for score, _ in runs)
    kept = [RunLatencies.of(run) for _, run in runs if run is not None]
    return Trial(
        devices=devices,
        deployment=str(deployment),
        attainment=share,
        served=share >= target,
        ttft_s=percentiles([t for run in kept for t in run.ttft_s]),
        tpot_s=percentiles([t for run in kept for t in run.tpot_s]),
    )
