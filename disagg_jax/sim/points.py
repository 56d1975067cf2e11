"""One simulated run as a task for a worker process, and what is kept of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence

from disagg_jax import metrics
from disagg_jax.lengths import Lengths
from disagg_jax.metrics import SLO, Attainment, Stages
from disagg_jax.request import Request, Status
from disagg_jax.sim.simulate import SimulatedDeployment
from disagg_jax.sim.workers import worker_pool
from disagg_jax.workload import POISSON, Arrivals, make_requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimWorkload:
    """Requests to draw. Common random numbers: equal seeds give equal requests.

    At another rate the same gaps are stretched, and a longer run begins with the
    shorter one.
    """

    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = POISSON
    max_total_tokens: int | None = None  # longer requests lose output, then prompt
    extra_tokens: int = 0  # generated beyond the output length

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """`n` requests at `rate_rps`."""
        drawn = make_requests(
            n=n,
            rate_rps=rate_rps,
            prompt_lengths=self.prompt,
            output_lengths=self.output,
            seed=seed,
            arrivals=self.arrivals,
        )
        return [self._fitted(request) for request in drawn]

    def _fitted(self, request: Request) -> Request:
        prompt, output = request.prompt_tokens, request.max_tokens
        if self.max_total_tokens is not None:
            prompt = min(prompt, self.max_total_tokens - 1)
            output = min(output, self.max_total_tokens - prompt)
        return dataclasses.replace(
            request, prompt_tokens=prompt, max_tokens=output + self.extra_tokens
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPoint:
    """A deployment at a rate, for one seed."""

    simulated: SimulatedDeployment
    workload: SimWorkload
    rate_rps: float  # of the whole deployment
    num_requests: int
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimResult:
    """What is kept of a run: enough to judge it by any SLO without running it again."""

    arrived: int  # requests, whether they were served or not
    ttft_s: tuple[float, ...]  # of those that finished, in order of arrival
    tpot_s: tuple[float, ...]
    stages: tuple[Stages, ...]
    steady: bool  # no growing backlog, see `metrics.is_steady`
    end_s: float

    def attainment(self, slo: SLO) -> Attainment:
        """Shares of the arrived requests; the rules are those of `metrics`."""
        ttft = [t <= slo.ttft_s for t in self.ttft_s]
        tpot = [t <= slo.tpot_s for t in self.tpot_s]
        joint = sum(a and b for a, b in zip(ttft, tpot, strict=True))
        return Attainment(
            joint=joint / self.arrived,
            ttft_only=sum(ttft) / self.arrived,
            tpot_only=sum(tpot) / self.arrived,
        )


def run_point(point: SimPoint) -> SimResult:
    """Simulates one point."""
    requests = point.workload.requests(point.num_requests, point.rate_rps, point.seed)
    run = point.simulated.run(requests)
    done = [t for t in run.timelines if t.status is Status.FINISHED]
    return SimResult(
        arrived=len(run.timelines),
        ttft_s=tuple(metrics.ttft_s(t) for t in done),
        tpot_s=tuple(metrics.tpot_s(t) for t in done),
        stages=tuple(metrics.stages_s(t) for t in done),
        steady=metrics.is_steady(run.timelines),
        end_s=run.end_s,
    )


def run_points(
    points: Sequence[SimPoint], workers: int | None = None
) -> Iterator[SimResult]:
    """Simulates points in worker processes; results come in the order of `points`.

    Args:
      workers: processes; by default one for each core. With 1 nothing is started.
    """
    workers = min(workers or os.cpu_count() or 1, max(1, len(points)))
    with worker_pool(workers) as mapper:
        yield from mapper(run_point, points)
