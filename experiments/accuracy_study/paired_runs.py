"""One system on the engine and in the simulator, on the same requests."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from disagg_jax import metrics
from disagg_jax.calibration.decision_agreement import Agreement, agreement
from disagg_jax.calibration.machine_speed import Slowdown, SpeedProbe
from disagg_jax.calibration.profile_keys import EngineWork, StepKey, cost_of
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.goodput import estimate
from disagg_jax.metrics.summary import summarise
from disagg_jax.request import Request, Timeline
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.runlog.utilisation import Occupancy, read_occupancy
from disagg_jax.search.capacity import capacity_rps
from disagg_jax.search.rates import SearchPlan, search
from disagg_jax.sim.cost.interface import DeploymentCost
from disagg_jax.sim.cost.measured import CalibratedCost, CalibratedProfile
from disagg_jax.sim.cost.measured_run import MeasuredCost, step_kind, step_load
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import Point
from experiments.sweep.request_source import RequestSource

# How much attainment may differ, unless it changes more over this much of the rate
# (DistServe's Table 2: within 2 points).
POINTS, RATE_CHANGE = 0.02, 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """A system at one rate; lists are of the seeds."""

    rate_rps: float
    engine: Sequence[Mapping[str, Any]]  # `summarise`, and the machine's `Slowdown`
    simulated: Sequence[Mapping[str, Any]]  # on a machine with that `Slowdown`
    # Attainment, simulated with the profile's durations as they are.
    profiled: Sequence[float]
    # Attainment, simulated with the durations that the engine had.
    measured: Sequence[float]
    allowed: float  # difference of attainment
    agreements: Sequence[Agreement]

    def mean(self, side: str, key: str) -> float:
        """Return a metric's mean over the seeds, on one side."""
        return statistics.fmean(run[key] for run in getattr(self, side))

    @property
    def difference(self) -> float:
        """Simulated attainment less the engine's."""
        return self.mean("simulated", "attainment") - self.mean("engine", "attainment")

    @property
    def difference_as_profiled(self) -> float:
        """`difference`, if the simulated machine is not slowed down."""
        return statistics.fmean(self.profiled) - self.mean("engine", "attainment")

    @property
    def by_durations(self) -> float:
        """The part of `difference` that the profile's durations cause."""
        with_engines = statistics.fmean(self.measured)
        return self.mean("simulated", "attainment") - with_engines

    @property
    def ok(self) -> bool:
        return abs(self.difference) <= self.allowed

    def slowdown(self, kind: str) -> float:
        """Return the machine's mean slowdown for a kind: decode or prompt."""
        return statistics.fmean(
            statistics.fmean(run["slowdown"][kind]) for run in self.engine
        )

    def relative(self, key: str) -> float:
        """Return the relative error of a simulated metric."""
        return self.mean("simulated", key) / self.mean("engine", key) - 1


class PredictedStep(NamedTuple):
    """A step of a run on one pipeline stage, beside its predicted time."""

    instance: int
    load: StepLoad
    measured_s: float
    predicted_s: float

    @property
    def kind(self) -> str:
        return step_kind(self.load)


def predicted_steps(
    occupancy: Occupancy, cost: DeploymentCost, slowdown: Slowdown
) -> Iterator[PredictedStep]:
    """Yield every step of a run, beside the time that `cost` predicts."""
    for use in occupancy.stages:
        load, instance = step_load(use.step), use.step.instance
        predicted_s = cost.stages_s(instance, load)[use.stage]
        predicted_s *= slowdown.factor(load, use.step.id - 1)
        yield PredictedStep(instance, load, use.end_s - use.start_s, predicted_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedRun:
    """A system on an engine, and simulated by a profile of it."""

    name: str
    server: ServedDeployment
    source: RequestSource
    slo: SLO
    seeds: Sequence[int]
    profile: CalibratedProfile
    run_dir: RunDir
    # Programs that run between the engine's steps and tell the machine's speed.
    probes: Mapping[StepKey, EngineWork]

    @functools.cached_property
    def cost(self) -> CalibratedCost:
        """The durations of the profile."""
        return cost_of(self.profile, self.server.engine)

    # -- engine ---------------------------------------------------------------------

    def has(self, point: Point) -> bool:
        """Return whether the engine has run."""
        return self.run_dir.has(point)

    def done(self, rates: Iterable[float]) -> list[float]:
        """Return the rates at which the engine has run with every seed."""
        return [rate for rate in rates if all(map(self.has, self.points(rate)))]

    def serve(self, point: Point) -> None:
        """Run the engine, unless that was done before."""
        if self.has(point):
            return
        requests = self.source(point.rate_rps, point.seed)
        speed = SpeedProbe(self.probes)
        log = EventLog()
        observed = dataclasses.replace(self.server, around=speed.around)
        run = observed.run(requests, observer=log)
        rows = [
            {"request_id": t.request.id, "token_s": t.token_s} for t in run.timelines
        ]
        slowdown = dataclasses.asdict(speed.slowdown(self.profile))
        found = {**self._summary(run.timelines), "slowdown": slowdown}
        self.run_dir.save(point, found, rows, log.lines)

    def slowdown(self, point: Point) -> Slowdown:
        """Return the slowdown of the machine in a run of the engine."""
        return Slowdown(**self.run_dir.load(point)["slowdown"])

    def points(self, rate_rps: float) -> list[Point]:
        """Return a run for each seed."""
        return [Point(self.name, rate_rps, seed) for seed in self.seeds]

    def again(self, rates: Sequence[float]) -> Point:
        """Return the repetition of the first seed's run at the middle rate."""
        return Point(f"{self.name}-again", rates[len(rates) // 2], self.seeds[0])

    def repeated(self, rates: Sequence[float]) -> float | None:
        """Return the attainment of that repetition less that of the run, if both are.

        It is None if there was no time for the repetition.
        """
        again = self.again(rates)
        if not self.has(again):
            return None
        runs = (again, dataclasses.replace(again, system=self.name))
        second, first = (self.run_dir.load(run)["attainment"] for run in runs)
        return second - first

    def predicted_steps(self, points: Iterable[Point]) -> Iterator[PredictedStep]:
        """Yield every step of runs of the engine, beside its predicted time."""
        for point in points:
            occupancy, slowdown = self._occupancy(point), self.slowdown(point)
            yield from predicted_steps(occupancy, self.cost, slowdown)

    def _occupancy(self, point: Point) -> Occupancy:
        return read_occupancy(self.server.deployment, self.run_dir.events(point))

    # -- simulation -----------------------------------------------------------------

    @property
    def simulated(self) -> SimulatedDeployment:
        """The system with the profile's durations.

        Without spans, since decisions are compared. Blocks are placed as the engine
        places them, since placement decides its programs.
        """
        return SimulatedDeployment(
            deployment=self.server.deployment,
            policies=self.server.policies,
            prefill_router=self.server.prefill_router,
            decode_router=self.server.decode_router,
            memory=self.server.memory,
            cost=self.cost,
            spans=False,
            counts_blocks=True,
        )

    def requests(self, rate_rps: float, seed: int) -> list[Request]:
        """Return the engine's requests, without their tokens."""
        found = self.source(rate_rps, seed)
        return [dataclasses.replace(request, prompt=None) for request in found]

    def attainments(self, rate_rps: float) -> list[float]:
        """Return the simulated attainment of each seed."""
        runs = (
            self.simulated.run(self.requests(rate_rps, seed)) for seed in self.seeds
        )
        return [metrics.attainment(run.timelines, self.slo).joint for run in runs]

    def knee_rps(self, target: float) -> float:
        """Return the simulated goodput."""
        tried: dict[float, Sequence[float]] = {}

        def evaluate(rate_rps: float) -> Sequence[float]:
            tried[rate_rps] = self.attainments(rate_rps)
            return tried[rate_rps]

        first = self.requests(1.0, self.seeds[0])
        start = 0.8 * capacity_rps(self.simulated, first, self.slo)
        search(evaluate, start, SearchPlan(target=target, tolerance=0.03))
        return estimate(tried, target).interval.mean

    # -- both -----------------------------------------------------------------------

    def compare(self, rate_rps: float) -> Compared:
        """Compare the engine's runs at a rate, which must be done, with simulations."""
        simulated: list[Mapping[str, Any]] = []
        measured: list[float] = []
        agreements: list[Agreement] = []
        points = self.points(rate_rps)
        for point in points:
            log, requests = EventLog(), self.requests(rate_rps, point.seed)
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
        """Return how much simulated attainment changes over `RATE_CHANGE`."""
        around = (1 - RATE_CHANGE, 1 + RATE_CHANGE)
        low, high = (statistics.fmean(self.attainments(rate_rps * f)) for f in around)
        return abs(high - low)

    def _summary(self, timelines: Sequence[Timeline]) -> dict[str, float | None]:
        return summarise(timelines, self.slo, self.server.deployment.devices)
