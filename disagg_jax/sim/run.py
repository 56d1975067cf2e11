"""One simulated run as a task for a worker process, and what is kept of it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.metrics import SLO, Attainment, Stages
from disagg_jax.request import Request, Status
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import worker_pool
from disagg_jax.workload.lengths import FixedLengths, Lengths
from disagg_jax.workload.requests import POISSON, Arrivals, make_requests
from disagg_jax.workload.traces import Ties, TraceRow, fit_rows
from disagg_jax.workload.traces.requests import stretch_requests, untied
from disagg_jax.workload.traces.stretches import why_shared


class Workload(Protocol):
    """Requests to be had. Common random numbers: equal seeds give equal requests."""

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """`n` requests at `rate_rps`. At another rate the same gaps are stretched."""
        ...

    def prompts_only(self) -> Workload:
        """The same with one output token for each request."""
        ...

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """Why runs of `n` requests are no independent samples; '' if they are."""
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

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """'': each seed has draws of its own."""
        return ""

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

    Each seed has a stretch of its own, as long as the trace has rows for it; then the
    trace begins again, and seeds share rows.

    Raises:
      ValueError: unless there are two rows or more, in time order, all of them with
        tokens, and not most of them at one time.
    """

    rows: tuple[TraceRow, ...]  # kept with their ties spread, unless those are kept
    ties: Ties = "spread"  # rows in one tick of a coarse clock: over it, or at one time
    arrivals: Arrivals = POISSON  # of rows without times
    # Where the rows come from and what was done to them, to print beside results.
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        require(len(self.rows) >= 2, "trace: expected two rows or more", len(self.rows))
        object.__setattr__(self, "rows", tuple(untied(self.rows, self.ties)))
        fewest = min(min(row.prompt_tokens, row.output_tokens) for row in self.rows)
        require(fewest >= 1, "trace: expected rows with tokens only", fewest)
        times = [row.arrival_s for row in self.rows]
        span_s = times[-1] - times[0]  # nan without times
        require(span_s != 0, "trace: expected a span > 0 s", span_s)
        tied = sum(a == b for a, b in itertools.pairwise(times))
        require(
            self.ties == "keep" or 2 * tied < len(times),
            "trace: expected most rows at times of their own, or ties='keep' if they "
            "really come at the same time",
            f"{tied} of {len(times)} at the time of the row above",
        )

    @classmethod
    def fitting(
        cls, rows: Sequence[TraceRow], max_total_tokens: int, ties: Ties = "spread"
    ) -> TraceWorkload:
        """Of the rows that have tokens, and together at most so many.

        Raises:
          ValueError: if fewer than two are left.
        """
        # Ties first: whom a tick's rows share it with does not depend on lengths.
        apart = untied(rows, ties)
        fitted = fit_rows(apart, max_total_tokens=max_total_tokens)
        notes = fitted.said(f"{max_total_tokens} tokens")
        if apart != list(rows):
            tick = (
                "rows of one tick of the clock are spread evenly over it (ties=spread)"
            )
            notes = (tick, *notes)
        return cls(rows=tuple(fitted.rows), ties=ties, notes=notes)

    def prompts_only(self) -> TraceWorkload:
        """The same with one output token for each request."""
        rows = tuple(row._replace(output_tokens=1) for row in self.rows)
        return dataclasses.replace(self, rows=rows)

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """`n` requests whose mean rate is `rate_rps`."""
        return stretch_requests(self.rows, n, rate_rps, seed, arrivals=self.arrivals)

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """Says how runs share rows of the trace."""
        return why_shared(seeds, n, len(self.rows), "rows of the trace")


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
