"""One simulated run as a task for a worker process, and what is kept of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from disagg_jax import metrics
from disagg_jax.expect import expect
from disagg_jax.lengths import FixedLengths, Lengths
from disagg_jax.metrics import SLO, Attainment, Stages
from disagg_jax.request import Request, Status
from disagg_jax.sim.simulate import SimulatedDeployment
from disagg_jax.sim.workers import worker_pool
from disagg_jax.traces import TraceRow, requests_from_trace
from disagg_jax.workload import POISSON, Arrivals, make_requests


class Workload(Protocol):
    """Requests to be had. Common random numbers: equal seeds give equal requests."""

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """`n` requests at `rate_rps`. At another rate the same gaps are stretched."""
        ...

    def prompts_only(self) -> Workload:
        """The same with one output token for each request."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimWorkload:
    """A `Workload` to draw; a longer run begins with the shorter one."""

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

    def prompts_only(self) -> SimWorkload:
        """The same with one output token for each request."""
        return dataclasses.replace(self, output=FixedLengths(tokens=1), extra_tokens=0)

    def _fitted(self, request: Request) -> Request:
        prompt, output = request.prompt_tokens, request.max_tokens
        if self.max_total_tokens is not None:
            prompt = min(prompt, self.max_total_tokens - 1)
            output = min(output, self.max_total_tokens - prompt)
        return dataclasses.replace(
            request, prompt_tokens=prompt, max_tokens=output + self.extra_tokens
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceWorkload:
    """A `Workload` of a trace's lengths and gaps.

    Each seed begins somewhere else in the trace, which begins again when it ends.

    Raises:
      ValueError: unless there are two rows or more, all of them with tokens, in a time.
    """

    rows: tuple[TraceRow, ...]

    def __post_init__(self) -> None:
        expect(len(self.rows) >= 2, "trace: expected two rows or more", len(self.rows))
        expect(self._span_s > 0, "trace: expected a span > 0 s", self._span_s)
        fewest = min(min(row.prompt_tokens, row.output_tokens) for row in self.rows)
        expect(fewest >= 1, "trace: expected rows with tokens only", fewest)

    @classmethod
    def fitting(cls, rows: Sequence[TraceRow], max_total_tokens: int) -> TraceWorkload:
        """Of the rows that have tokens, and together at most so many."""
        return cls(
            rows=tuple(
                row
                for row in rows
                if min(row.prompt_tokens, row.output_tokens) >= 1
                and row.prompt_tokens + row.output_tokens <= max_total_tokens
            )
        )

    def prompts_only(self) -> TraceWorkload:
        """The same with one output token for each request."""
        return TraceWorkload(
            rows=tuple(row._replace(output_tokens=1) for row in self.rows)
        )

    @property
    def _span_s(self) -> float:
        return self.rows[-1].arrival_s - self.rows[0].arrival_s

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """`n` requests whose mean rate is `rate_rps`."""
        count = len(self.rows)
        lap_s = self._span_s * count / (count - 1)  # with a mean gap at its end
        start = int(np.random.default_rng(seed).integers(count))
        rows = [
            row._replace(arrival_s=row.arrival_s + lap * lap_s)
            for lap, row in (
                (i // count, self.rows[i % count]) for i in range(start, start + n)
            )
        ]
        # One request has no rate; two at the same time have none either.
        spread = rows[-1].arrival_s > rows[0].arrival_s
        rate = rate_rps if spread else None
        return requests_from_trace(rows, seed=seed, rate_rps=rate).requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPoint:
    """A deployment at a rate, for one seed."""

    simulated: SimulatedDeployment
    workload: Workload
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
