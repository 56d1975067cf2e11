"""One simulated run that is only scored: by DistServe's criterion it may stop early.

By any other criterion a run goes on to its end. By DistServe's criterion, a request is
missed for certain as soon as one of these is known:

* it was refused, or it finished without meeting the targets;
* it has no first token, and its TTFT would be too long if the token came now;
* its TPOT would be too long if all remaining tokens came now.

The run is cut when so many requests are missed that the target is out of reach. Times
are compared with the float operations of `metrics`, which grow with the time of the
token, so a run that is cut would fail in full as well. (No request stops early in a
simulation: it generates `max_tokens`.)
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import math
import statistics
from collections.abc import Sequence

from disagg_jax import metrics
from disagg_jax.control.run import Run
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import Criterion, DistServe
from disagg_jax.request import Status, Timeline
from disagg_jax.sim.run import SimulationTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutShortRun:
    """A run to score, and the number of misses at which it may end."""

    point: SimulationTask
    criterion: Criterion
    cut_at_misses: int  # enough to decide the score; > num_requests: never cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunScore:
    """The score of a run."""

    score: float  # by the criterion; of a cut run, an upper bound that fails too
    cut: bool  # whether the run ended early
    steady: bool  # no growing backlog, see `metrics.is_steady`; False if it was cut


def decisive_misses(num_requests: int, num_seeds: int, target: float) -> int:
    """Return the fewest misses in one run that make the mean over all seeds fail.

    The runs of the other seeds may be perfect, so the attainment of this run fails too.
    """

    def fails(misses: int) -> bool:
        own = (num_requests - misses) / num_requests
        return statistics.mean([1.0] * (num_seeds - 1) + [own]) < target

    return bisect.bisect_left(range(num_requests + 1), True, key=fails)


class _Decided(Exception):
    """Raised to end a run in which enough requests are missed."""

    def __init__(self, misses: int):
        super().__init__(misses)
        self.misses = misses


def score_run(run: CutShortRun) -> RunScore:
    """Simulate `run` until its score is decided."""
    return watch_run(run)[0]


def watch_run(run: CutShortRun) -> tuple[RunScore, Run | None]:
    """Simulate `run` until its score is decided; return None for a run that was cut."""
    point = run.point
    requests = point.requests()
    controller = point.simulated.controller()
    watch = None
    if isinstance(run.criterion, DistServe):
        slo = run.criterion.slo
        watch = _Watch(controller.timelines, slo, run.cut_at_misses)
    try:
        done = point.simulated.run(requests, observer=watch, controller=controller)
    except _Decided as decided:
        share = (point.num_requests - decided.misses) / point.num_requests
        return RunScore(score=share, cut=True, steady=False), None
    score = RunScore(
        score=run.criterion.score(controller.timelines),
        cut=False,
        steady=metrics.is_steady(controller.timelines),
    )
    return score, done


class _Watch:
    """An `Observer` that counts requests which are missed for certain.

    It looks at a request when its deadline has passed, so a turn costs two comparisons.
    """

    def __init__(self, timelines: Sequence[Timeline], slo: SLO, cut_at_misses: int):
        self.missed = 0
        self._timelines, self._slo = timelines, slo
        self._cut_at_misses = cut_at_misses
        self._next = 0  # the first request, by arrival, whose TTFT is not judged
        # (about the deadline of its TPOT, index) of requests whose TTFT was in time.
        self._started: list[tuple[float, int]] = []

    def __call__(self, now_s: float, events: object, works: object) -> None:
        missed = self.missed
        self._judge_ttft(now_s)
        self._judge_tpot(now_s)
        if self.missed > missed and self.missed >= self._cut_at_misses:
            raise _Decided(self.missed)

    def _judge_ttft(self, now_s: float) -> None:
        while self._next < len(self._timelines):
            timeline = self._timelines[self._next]
            ends_s = timeline.token_s[0] if timeline.token_s else now_s
            late = ends_s - timeline.request.arrival_s > self._slo.ttft_s
            if late or timeline.status is Status.REFUSED:
                self.missed += 1
            elif timeline.token_s:
                self._expect_last_token(timeline)
            else:
                return
            self._next += 1

    def _expect_last_token(self, timeline: Timeline) -> None:
        gaps = timeline.request.max_tokens - 1
        if gaps and self._slo.tpot_s < math.inf:
            due_s = timeline.token_s[0] + gaps * self._slo.tpot_s
            heapq.heappush(self._started, (due_s, self._next))

    def _judge_tpot(self, now_s: float) -> None:
        while self._started and self._started[0][0] < now_s:
            timeline = self._timelines[self._started[0][1]]
            gaps = timeline.request.max_tokens - 1
            if timeline.status is Status.FINISHED:
                self.missed += not metrics.meets_tpot(timeline, self._slo)
            elif (now_s - timeline.token_s[0]) / gaps > self._slo.tpot_s:
                self.missed += 1
            else:  # within rounding of the deadline
                return
            heapq.heappop(self._started)
