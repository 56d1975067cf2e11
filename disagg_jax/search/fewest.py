"""The fewest devices on which a system serves a rate within its targets.

Whole deployments are simulated at the rate itself: a trace from its first row to its
last, with its own gaps. An estimate only says where to begin: the capacity of each
layout that a comparison searched, times the share of it that its goodput was there.
From there the number of devices goes up or down, by larger and larger steps, until a
number that serves the rate is next to one that does not.

Of a number of devices all deployments are tried, the most promising first, until one
serves the rate; but for those that cannot by a bound. By their capacity, with a margin;
and where prefill and decode are apart, by each phase alone (`phases`), at a rate that
is lower by a margin: the fewest instances of each tp that serve it are simulated once.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment, InstanceSpec, Parallelism, Role
from disagg_jax.errors import require
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
from disagg_jax.search.goodput import GoodputSearch
from disagg_jax.search.maps import Cell
from disagg_jax.search.phases import decode_alone, prefill_alone
from disagg_jax.search.placement import colocated_instances, pair
from disagg_jax.sim.run import RunLatencies
from disagg_jax.workload.workload import TraceWorkload

# A phase alone is to serve the rate over this, as prefill may smooth what decode gets.
_PHASE_MARGIN = 1.1
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
      bound: devices below which it cannot, by capacity or by a phase alone; None if no
        number can.
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
    known = {
        devices: ranked
        for devices in range(1, task.demand.max_devices + 1)
        if (ranked := _ranked(task.units, devices))
    }
    least = min(known, default=0)
    able = _by_capacity(task, known)
    smallest = able.get(least, ())
    if smallest and smallest[0].promise_rps >= task.demand.rate_rps:
        only = _trial(task, least, smallest[0].deployment)
        if only.served:  # and there is nothing below it to bound
            return _answer(task, only, least, least, [only])
    able = _by_phases(task, able)
    if not able:
        return _answer(task, None, None, least, [])
    sizes = list(able)
    trials: dict[int, list[Trial]] = {}

    def serves(at: int) -> bool:
        devices = sizes[at]
        trials[devices] = list(_try(task, devices, able[devices]))
        return trials[devices][-1].served

    promising = (
        at
        for at, devices in enumerate(sizes)
        if able[devices][0].promise_rps >= task.demand.rate_rps
    )
    at = lowest(serves, next(promising, len(sizes) - 1), len(sizes))
    best = None if at is None else trials[sizes[at]][-1]
    tried = list(itertools.chain(*trials.values()))
    return _answer(task, best, sizes[0], least, tried)


def _answer(
    task: FewestSearch,
    best: Trial | None,
    bound: int | None,
    least: int,
    trials: Sequence[Trial],
) -> FewestDevices:
    return FewestDevices(
        system=task.system, best=best, bound=bound, least=least, trials=tuple(trials)
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


# ---- bounds --------------------------------------------------------------------------


def _by_capacity(
    task: FewestSearch, known: Mapping[int, Sequence[_Ranked]]
) -> dict[int, list[_Ranked]]:
    """Return the deployments that may serve the rate by their capacity."""
    rate_rps = task.demand.rate_rps
    return _kept(known, lambda each: CAPACITY_MARGIN * each.capacity_rps >= rate_rps)


def _by_phases(
    task: FewestSearch, known: Mapping[int, Sequence[_Ranked]]
) -> dict[int, list[_Ranked]]:
    """Return the deployments of which each phase alone serves the rate."""
    least = {
        (role, tp): _least_alone(task, role, tp)
        for role, tp in _parts(known)
        if role is not Role.COLOCATED
    }

    def phases_serve(each: _Ranked) -> bool:
        counts = collections.Counter(map(_part, each.deployment.instances))
        return all(count >= least.get(part, 0) for part, count in counts.items())

    return _kept(known, phases_serve)


def _kept(
    known: Mapping[int, Sequence[_Ranked]], keep: Callable[[_Ranked], bool]
) -> dict[int, list[_Ranked]]:
    kept = {devices: list(filter(keep, ranked)) for devices, ranked in known.items()}
    return {devices: ranked for devices, ranked in kept.items() if ranked}


_Part = tuple[Role, int]  # a role and the tp of its instances


def _part(instance: InstanceSpec) -> _Part:
    return instance.role, instance.parallelism.tp


def _parts(known: Mapping[int, Sequence[_Ranked]]) -> set[_Part]:
    deployments = (each.deployment for ranked in known.values() for each in ranked)
    return {_part(i) for each in deployments for i in each.instances}


def _least_alone(task: FewestSearch, role: Role, tp: int) -> float:
    """Return the fewest instances of a phase that serve the rate alone; inf if none."""
    layout, prefill = Parallelism(tp), role is Role.PREFILL
    alone = prefill_alone if prefill else decode_alone
    position = 0 if prefill else -1
    one_rps = max(
        unit.capacity_rps[position] for unit in task.units if unit.tp[position] == tp
    )
    most = (task.demand.max_devices - 1) // tp  # the other phase has one at least

    def serves(at: int) -> bool:
        counts = (at + 1, 1) if prefill else (1, at + 1)
        search = alone(_search(task, pair(layout, layout, *counts)))
        _, served, _ = _attained(search, task.demand.rate_rps / _PHASE_MARGIN)
        return served

    start = min(most - 1, int(task.demand.rate_rps / one_rps))
    at = lowest(serves, start, most)
    return math.inf if at is None else at + 1


# ---- the search ----------------------------------------------------------------------


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
    for each in ranked:
        trial = _trial(task, devices, each.deployment)
        yield trial
        if trial.served:
            return


def _trial(task: FewestSearch, devices: int, deployment: Deployment) -> Trial:
    """Simulate a whole deployment at the rate."""
    share, served, runs = _attained(_search(task, deployment), task.demand.rate_rps)
    kept = [RunLatencies.of(run) for run in runs]
    return Trial(
        devices=devices,
        deployment=str(deployment),
        attainment=share,
        served=served,
        ttft_s=percentiles([t for run in kept for t in run.ttft_s]),
        tpot_s=percentiles([t for run in kept for t in run.tpot_s]),
    )


def _search(task: FewestSearch, deployment: Deployment) -> GoodputSearch:
    """Return a deployment with the requests and targets of the question."""
    simulated, _ = simulate(task.spec, task.cell, task.system, deployment, task.size)
    return GoodputSearch(
        simulated=simulated,
        workload=task.cell.workload,
        slo=task.cell.slo,
        plan=task.spec.plan,
        num_requests=task.demand.num_requests,
        seeds=task.demand.seeds,
    )


def _attained(search: GoodputSearch, rate_rps: float) -> tuple[float, bool, list[Run]]:
    """Return the attainment, whether that serves the rate, and the runs in full."""
    good, count = search.good, len(search.seeds)
    misses = decisive_misses(search.num_requests, count, search.plan.target)
    runs = [
        watch_run(CutShortRun(point=point, criterion=good, cut_at_misses=misses))
        for point in search.points(rate_rps)
    ]
    share = statistics.fmean(score.score for score, _ in runs)
    kept = [run for _, run in runs if run is not None]
    return share, share >= search.plan.target, kept
