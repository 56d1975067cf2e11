"""Systems over rates, and what the runs say about an SLO."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from disagg_jax import metrics
from disagg_jax.deployment import Deployment
from disagg_jax.metrics import SLO
from disagg_jax.sim.run import RunLatencies, SimulationTask
from disagg_jax.workload import RandomWorkload
from experiments.configs.named_simulations import Simulation
from experiments.papers.distserve.published import TARGET
from experiments.papers.figure import Lab, shown, shown_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A deployment with its policies and cost model, as a figure's runs need it."""

    label: str
    simulation: Simulation
    deployment: str  # as `Deployment.parse` reads it
    num_requests: int  # of a run
    # GPUs that a rate is divided over; None is all of them. A phase studied alone has
    # helpers that do not count.
    devices: int | None = None

    def points(
        self, lab: Lab, workload: RandomWorkload, rates: Sequence[float]
    ) -> list[SimulationTask]:
        """A run for each rate (requests/s per GPU) and seed, seeds innermost."""
        deployment = Deployment.parse(self.deployment)
        extra = workload.extra_tokens + self.simulation.extra_tokens
        return [
            SimulationTask(
                simulated=self.simulation.build(deployment),
                workload=dataclasses.replace(workload, extra_tokens=extra),
                rate_rps=rate * (self.devices or deployment.devices),
                num_requests=lab.requests(self.num_requests),
                seed=seed,
            )
            for rate in rates
            for seed in range(lab.seeds)
        ]

    def said(self, lab: Lab) -> str:
        """What was run, for the report."""
        instances = Deployment.parse(self.deployment).instances
        cost = self.simulation.cost_of(instances[0]).name
        return (
            f"{self.label}: {self.deployment}, {cost}, "
            f"N={lab.requests(self.num_requests)} x {lab.seeds} seeds"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A system's runs: rate per GPU -> the result of each seed."""

    system: System
    results: Mapping[float, Sequence[RunLatencies]]

    def attainments(self, slo: SLO) -> dict[float, list[float]]:
        """Joint attainment of each seed at each rate."""
        return {
            rate: [result.attainment(slo).joint for result in results]
            for rate, results in self.results.items()
        }

    def limit(self, slo: SLO) -> str:
        """Which target breaks the system: at the lowest rate that fails it."""
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
        """Each seed's crossing of the target, interpolated on the rates that ran."""
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
        text = (">= " if self.top else "") + shown(self.rates)
        failed = sum(rate == 0 for rate in self.rates)
        note = f" ({failed} of {len(self.rates)} seeds fail at the lowest rate)"
        return text + (note if failed else "")

    def over(self, other: Goodputs) -> str:
        """The ratio, paired by seed."""
        pairs = list(zip(self.rates, other.rates, strict=True))
        if any(below == 0 for _, below in pairs):
            return "no ratio: a seed of the divisor fails at the lowest rate"
        return shown([above / below for above, below in pairs], ".2f", "x")


def run_systems(
    lab: Lab,
    systems: Sequence[System],
    workload: RandomWorkload,
    rates: Sequence[float],
) -> dict[str, Sweep]:
    """Every system at every rate with every seed; all see the same requests."""
    parts = [system.points(lab, workload, rates) for system in systems]
    results = iter(lab.run([point for part in parts for point in part]))
    return {
        system.label: Sweep(
            system=system,
            results={rate: [next(results) for _ in range(lab.seeds)] for rate in rates},
        )
        for system in systems
    }


def percent(shares: Sequence[float]) -> str:
    """Shares as a percentage with an interval that stays within 0 and 100."""
    found = metrics.interval_across([100 * share for share in shares])
    if found.low is not None and found.high is not None:
        low, high = max(0.0, found.low), min(100.0, found.high)
        found = dataclasses.replace(found, low=low, high=high)
    return shown_interval(found, ".1f", " %")


def tightest_scale(result: RunLatencies, slo: SLO, target: float = TARGET) -> float:
    """The smallest factor on both targets at which the run attains `target`.

    Exactly: each request needs a factor of its own, and this is a quantile of them;
    infinite where too few requests finished.
    """
    needed = sorted(
        max(ttft / slo.ttft_s, tpot / slo.tpot_s)
        for ttft, tpot in zip(result.ttft_s, result.tpot_s, strict=True)
    )
    rank = math.ceil(target * result.arrived - 1e-9)
    return needed[rank - 1] if rank <= len(needed) else math.inf


def geometric(low: float, high: float, n: int) -> list[float]:
    """`n` rates from `low` to `high`, each the same factor above the one before."""
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)]
