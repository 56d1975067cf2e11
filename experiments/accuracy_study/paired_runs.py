"""One system twice, on the engine and in the simulator, on the same requests."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax import metrics
from disagg_jax.calibration.decision_agreement import (
    Agreement,
    MeasuredCost,
    Slowdown,
    StepTime,
    agreement,
    step_times,
)
from disagg_jax.calibration.machine_speed import Speedometer
from disagg_jax.calibration.profile_keys import Probe, StepKey, cost_of
from disagg_jax.engine.executor import run_alone
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.metrics import SLO, estimate
from disagg_jax.metrics.summary import summarise
from disagg_jax.request import Request, Timeline
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.runlog.utilisation import Occupancy, read_occupancy
from disagg_jax.search.capacity import capacity_rps
from disagg_jax.search.rates import SearchPlan, search
from disagg_jax.sim.cost.measured import CalibratedCost, CalibratedProfile
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from experiments.runs.run_dir import Point, RunDir
from experiments.sweep.request_source import RequestSource

# How much attainment may differ, unless it changes more over this much of the rate
# (DistServe's Table 2: within 2 points).
POINTS, RATE_CHANGE = 0.02, 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """A system at one rate; lists are of the seeds."""

    rate_rps: float
    engine: Sequence[Mapping[str, Any]]  # `summarise`, and the machine's `Slowdown`
    simulated: Sequence[Mapping[str, Any]]  # on a machine that is slowed down so
    # Attainment, simulated with the profile's durations as they are.
    profiled: Sequence[float]
    # Attainment, simulated with the durations that the engine had.
    measured: Sequence[float]
    allowed: float  # difference of attainment
    agreements: Sequence[Agreement]

    def mean(self, side: str, key: str) -> float:
        """A metric's mean over the seeds, on one side."""
        return statistics.fmean(run[key] for run in getattr(self, side))

    @property
    def difference(self) -> float:
        """Attainment, simulated less engine."""
        return self.mean("simulated", "attainment") - self.mean("engine", "attainment")

    @property
    def difference_as_profiled(self) -> float:
        """The same without what the machine's speed explains."""
        return statistics.fmean(self.profiled) - self.mean("engine", "attainment")

    @property
    def by_durations(self) -> float:
        """What of `difference` goes with the profile's durations; the rest stays."""
        with_engines = statistics.fmean(self.measured)
        return self.mean("simulated", "attainment") - with_engines

    @property
    def ok(self) -> bool:
        return abs(self.difference) <= self.allowed

    def slowdown(self, kind: str) -> float:
        """Of the machine since the profile was taken; kind is decode or prompt."""
        return statistics.fmean(
            statistics.fmean(run["slowdown"][kind]) for run in self.engine
        )

    def relative(self, key: str) -> float:
        """How far the simulated metric is off."""
        return self.mean("simulated", key) / self.mean("engine", key) - 1


@dataclasses.dataclass(frozen=True)
class Twin:
    """A system on an engine, and simulated by a profile of it."""

    name: str
    server: ServedDeployment
    source: RequestSource
    slo: SLO
    seeds: int
    profile: CalibratedProfile
    cost: CalibratedCost
    run_dir: RunDir
    # That run between the engine's steps and tell the machine's speed.
    probes: Mapping[StepKey, Probe]

    @classmethod
    def of(
        cls,
        name: str,
        server: ServedDeployment,
        source: RequestSource,
        slo: SLO,
        seeds: int,
        profile: CalibratedProfile,
        run_dir: RunDir,
        probes: Mapping[StepKey, Probe],
    ) -> Twin:
        cost = cost_of(profile, server.engine)
        return cls(name, server, source, slo, seeds, profile, cost, run_dir, probes)

    # -- engine ---------------------------------------------------------------------

    def serve(self, point: Point) -> None:
        """Runs the engine, unless that was done before."""
        if self.run_dir.has(point):
            return
        requests = self.source(point.rate_rps, point.replica)
        speedometer = Speedometer(self.probes, lambda e, work: run_alone(e, work)[0])
        log = EventLog()
        observed = dataclasses.replace(self.server, around=speedometer.around)
        run = observed.run(requests, observer=log)
        rows = [
            {"request_id": t.request.id, "token_s": t.token_s} for t in run.timelines
        ]
        slowdown = dataclasses.asdict(speedometer.slowdown(self.profile))
        found = {**self._summary(run.timelines), "slowdown": slowdown}
        self.run_dir.save(point, found, rows, log.lines)

    def slowdown(self, point: Point) -> Slowdown:
        """Of the machine in a run, since the profile was taken."""
        return Slowdown(**self.run_dir.load(point)["slowdown"])

    def points(self, rate_rps: float) -> list[Point]:
        """A run for each seed."""
        return [Point(self.name, rate_rps, replica) for replica in range(self.seeds)]

    def again(self, rates: Sequence[float]) -> Point:
        """The first seed's run at the middle rate, once more."""
        return Point(f"{self.name}-again", rates[len(rates) // 2], 0)

    def repeated(self, rates: Sequence[float]) -> float:
        """How much attainment differs between two runs of the same requests."""
        again = self.again(rates)
        runs = (again, dataclasses.replace(again, system=self.name))
        second, first = (self.run_dir.load(run)["attainment"] for run in runs)
        return second - first

    def step_times(self, points: Iterable[Point]) -> Iterator[StepTime]:
        """What every step took in runs of the engine, and what was predicted."""
        for point in points:
            occupancy, slowdown = self._occupancy(point), self.slowdown(point)
            yield from step_times(occupancy, self.cost, slowdown)

    def _occupancy(self, point: Point) -> Occupancy:
        return read_occupancy(self.server.deployment, self.run_dir.events(point))

    # -- simulation -----------------------------------------------------------------

    @property
    def simulated(self) -> SimulatedDeployment:
        """The same policies and memory with the profile's durations.

        Decisions are compared, and spans would be others. Blocks are where the engine
        has them, which decides its programs.
        """
        return SimulatedDeployment(
            deployment=self.server.deployment,
            policies=self.server.policies,
            memory=self.server.memory,
            cost=self.cost,
            spans=False,
            exact_block_placement=True,
        )

    def requests(self, rate_rps: float, replica: int) -> list[Request]:
        """Those of the engine, without their tokens."""
        found = self.source(rate_rps, replica)
        return [dataclasses.replace(request, prompt=None) for request in found]

    def attainments(self, rate_rps: float) -> list[float]:
        """Simulated, of each seed."""
        runs = (self.simulated.run(self.requests(rate_rps, i)) for i in self._replicas)
        return [metrics.attainment(run.timelines, self.slo).joint for run in runs]

    def knee_rps(self, target: float) -> float:
        """The simulated goodput."""
        tried: dict[float, Sequence[float]] = {}

        def evaluate(rate_rps: float) -> Sequence[float]:
            tried[rate_rps] = self.attainments(rate_rps)
            return tried[rate_rps]

        start = 0.8 * capacity_rps(self.simulated, self.requests(1.0, 0), self.slo)
        search(evaluate, start, SearchPlan(target=target, tolerance=0.03))
        return estimate(tried, target).interval.mean

    # -- both -----------------------------------------------------------------------

    def compare(self, rate_rps: float) -> Compared:
        """The runs of the engine at a rate, which must be done, and their twins."""
        simulated: list[Mapping[str, Any]] = []
        measured: list[float] = []
        agreements: list[Agreement] = []
        points = self.points(rate_rps)
        for point in points:
            log, requests = EventLog(), self.requests(rate_rps, point.replica)
            stepwise = dataclasses.replace(
                self.simulated, cost=self.slowdown(point).of(self.cost)
            )
            simulated.append(
                self._summary(stepwise.run(requests, observer=log).timelines)
            )
            occupancy = self._occupancy(point)
            informed = dataclasses.replace(
                stepwise, cost=MeasuredCost(self.cost, occupancy)
            )
            timelines = informed.run(requests).timelines
            measured.append(metrics.attainment(timelines, self.slo).joint)
            agreements.append(agreement(self.run_dir.events(point), log.lines))
        return Compared(
            rate_rps=rate_rps,
            engine=[self.run_dir.load(point) for point in points],
            simulated=simulated,
            profiled=self.attainments(rate_rps),
            measured=measured,
            allowed=max(POINTS, self._change(rate_rps)),
            agreements=agreements,
        )

    def _change(self, rate_rps: float) -> float:
        """Of the attainment, simulated, where the rate changes as far as it may."""
        around = (1 - RATE_CHANGE, 1 + RATE_CHANGE)
        low, high = (statistics.fmean(self.attainments(rate_rps * f)) for f in around)
        return abs(high - low)

    def _summary(self, timelines: Sequence[Timeline]) -> dict[str, float | None]:
        return summarise(timelines, self.slo, self.server.deployment.devices)

    @property
    def _replicas(self) -> range:
        return range(self.seeds)
