"""One simulated run as a task for a worker process, and what is kept of it."""

from __future__ import annotations

import dataclasses

from disagg_jax import metrics
from disagg_jax.control.run import Run
from disagg_jax.metrics import SLO, Attainment, Stages
from disagg_jax.request import Request, Status
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationTask:
    """A run of a deployment at a rate, for one seed."""

    simulated: SimulatedDeployment
    workload: Workload
    rate_rps: float  # of the whole deployment
    num_requests: int
    seed: int = 0

    def requests(self) -> list[Request]:
        """Return the requests of the run."""
        return self.workload.requests(self.num_requests, self.rate_rps, self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLatencies:
    """What is kept of a run: enough to judge it by any SLO without running it again."""

    arrived: int  # requests, whether they were served or not
    ttft_s: tuple[float, ...]  # of the requests that finished, in order of arrival
    tpot_s: tuple[float, ...]
    stages: tuple[Stages, ...]
    steady: bool  # no growing backlog, see `metrics.is_steady`
    end_s: float

    @classmethod
    def of(cls, run: Run) -> RunLatencies:
        """Return what is kept of a run."""
        done = [t for t in run.timelines if t.status is Status.FINISHED]
        return cls(
            arrived=len(run.timelines),
            ttft_s=tuple(metrics.ttft_s(t) for t in done),
            tpot_s=tuple(metrics.tpot_s(t) for t in done),
            stages=tuple(metrics.stages_s(t) for t in done),
            steady=metrics.is_steady(run.timelines),
            end_s=run.end_s,
        )

    def attainment(self, slo: SLO) -> Attainment:
        """Return shares of the arrived requests, by the rules of `metrics`."""
        ttft = [t <= slo.ttft_s for t in self.ttft_s]
        tpot = [t <= slo.tpot_s for t in self.tpot_s]
        joint = sum(a and b for a, b in zip(ttft, tpot, strict=True))
        return Attainment(
            joint=joint / self.arrived,
            ttft_only=sum(ttft) / self.arrived,
            tpot_only=sum(tpot) / self.arrived,
        )


def run_task(task: SimulationTask) -> RunLatencies:
    """Simulate one task."""
    return RunLatencies.of(task.simulated.run(task.requests()))
