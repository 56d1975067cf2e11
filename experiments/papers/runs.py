"""Runs the arms of a figure over rates, and judges the runs by an SLO."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from disagg_jax import metrics
from disagg_jax.deployment import Deployment
from disagg_jax.metrics.attainment import SLO
from disagg_jax.sim.run import RunLatencies, SimulationTask, run_task
from disagg_jax.sim.simulation import Simulation
from disagg_jax.workload.workload import RandomWorkload
from experiments.papers.distserve.published import TARGET
from experiments.papers.figure import Lab
from experiments.report.intervals import across_seeds, ratio_text

# Requests/s per GPU so low that none waits: what queueing cannot be blamed for.
IDLE = 1e-3


@dataclasses.dataclass(frozen=True)
class Arm:
    """A deployment with its policies and cost model, as a figure's runs need it."""

    label: str
    simulation: Simulation
    deployment: str  # as `Deployment.parse` reads it
    _: dataclasses.KW_ONLY
    num_requests: int  # of a run
    # GPUs that a rate is divided over; None is all of them. A phase studied alone has
    # helpers that do not count.
    devices: int | None = None

    def run(self, lab: Lab, workload: RandomWorkload, rate: float) -> SimulationTask:
        """Return the run at a rate, in requests/s per GPU."""
        deployment = Deployment.parse(self.deployment)
        extra = workload.extra_tokens + self.simulation.extra_tokens
        return SimulationTask(
            simulated=self.simulation.build(deployment),
            workload=dataclasses.replace(workload, extra_tokens=extra),
            rate_rps=rate * (self.devices or deployment.devices),
            num_requests=lab.requests(self.num_requests),
            seed=0,
        )

    def said(self, lab: Lab) -> str:
        """Write what was run, for the report."""
        instances = Deployment.parse(self.deployment).instances
        cost = self.simulation.cost_of(instances[0]).name
        size = lab.size(self.num_requests)
        return f"{self.label}: {self.deployment}, {cost}, {size}"


@dataclasses.dataclass(frozen=True)
class ArmRuns:
    """An arm's runs: rate per GPU -> the result of each seed."""

    arm: Arm
    results: Mapping[float, Sequence[RunLatencies]]

    def each(
        self, measure: Callable[[RunLatencies], float]
    ) -> dict[float, list[float]]:
        """Return the measure of each seed's run, by rate."""
        return {rate: [*map(measure, runs)] for rate, runs in self.results.items()}

    def attainments(self, slo: SLO) -> dict[float, list[float]]:
        """Return each seed's joint attainment, by rate."""
        return self.each(lambda result: result.attainment(slo).joint)

    def percentages(self, slo: SLO) -> dict[float, list[float]]:
        """Return each seed's joint attainment in %, by rate; without that of `IDLE`."""
        found = self.attainments(slo)
        return {r: [100 * s for s in found[r]] for r in found if r != IDLE}

    def by_scale(
        self, slo: SLO, rate: float, scales: Sequence[float]
    ) -> dict[float, list[float]]:
        """Return each seed's attainment in % at a rate, by the scale of the SLO."""
        results = self.results[rate]
        return {
            x: [100 * r.attainment(slo.scaled(x)).joint for r in results]
            for x in scales
        }

    def limit(self, slo: SLO) -> str:
        """Name the target that breaks the arm at the lowest failing rate."""
        for results in self.results.values():
            found = [result.attainment(slo) for result in results]
            joint, ttft, tpot = (
                statistics.mean(getattr(each, part) for each in found)
                for part in ("joint", "ttft_only", "tpot_only")
            )
            if joint < TARGET:
                return "TTFT" if ttft < tpot else "TPOT"
        return "neither target"

    def goodputs(self, slo: SLO) -> Goodputs:
        """Return each seed's crossing of the target, interpolated between rates."""
        by_seed = zip(*self.attainments(slo).values(), strict=True)
        found = [
            metrics.goodput(list(zip(self.results, values, strict=True)), TARGET)
            for values in by_seed
        ]
        return Goodputs(
            rates=tuple(each.rate_rps for each in found),
            top=all(each.fail_rps is None for each in found),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goodputs:
    """Requests/s per GPU at the target, one for each seed; 0 where every rate fails."""

    rates: tuple[float, ...]
    top: bool  # no seed failed at any rate: bounds from below

    def __str__(self) -> str:
        text = (">= " if self.top else "") + across_seeds(self.rates)
        failed = sum(rate == 0 for rate in self.rates)
        note = f" ({failed} of {len(self.rates)} seeds fail at the lowest rate)"
        return text + (note if failed else "")

    def over(self, other: Goodputs) -> str:
        """Write the ratio, paired by seed."""
        undefined = "no ratio: a seed of the divisor fails at the lowest rate"
        return ratio_text(self.rates, other.rates, undefined)


def run_arms(
    lab: Lab, arms: Sequence[Arm], workload: RandomWorkload, rates: Sequence[float]
) -> dict[str, ArmRuns]:
    """Run every arm at every rate with every seed; all see the same requests."""
    runs = {
        (arm.label, rate): arm.run(lab, workload, rate)
        for arm in arms
        for rate in rates
    }
    found = lab.by_seed(run_task, runs)
    return {
        arm.label: ArmRuns(arm, {rate: found[arm.label, rate] for rate in rates})
        for arm in arms
    }


def geometric(low: float, high: float, n: int) -> list[float]:
    """Return `n` rates from `low` to `high` in equal factors."""
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)]
