"""The only definitions of latency, attainment, goodput and their intervals.

Names and formulas are vLLM's `bench serve` (0.33): TTFT = first token - arrival, E2EL =
last token - arrival, TPOT = (last - first token) / (n - 1), ITL = every gap between two
tokens of a request, pooled over requests. So E2EL = TTFT + (n - 1) * TPOT always.
Attainment and goodput are DistServe's (OSDI'24). Seconds everywhere.

The edge rules, where tools differ:

* Every request that arrived is in the denominator of attainment.
* Only a FINISHED request can be good. Unfinished, refused and cancelled ones are
  missed, and are left out of latency statistics.
* A one-token request has TPOT 0, so it meets any TPOT target; it is left out of TPOT
  statistics.
* A latency equal to its target meets it (`<=`).

Uncertainty comes from independent runs (`interval_across`), never from a binomial
formula over requests: requests that share a queue succeed and fail together. On an
M/D/1 queue of 1000 requests whose true attainment is 0.9, 95 % intervals covered the
truth this often (4000 runs; tests/metrics/test_metrics.py repeats the middle column):

    utilisation                             .6    .75   .85
    Student-t over 5 runs                   95    94    92 %
    10 batch means of one run               92    87    77 %
    Wilson (binomial) over one run          53    34    21 %
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # pyright: ignore  # scipy ships no types

from disagg_jax.request import Status, Timeline

# ---- one request ---------------------------------------------------------------------


def ttft_s(timeline: Timeline) -> float:
    """Time to first token: first token - arrival.

    Raises:
      ValueError: if there is no token yet.
    """
    return _stamps(timeline)[0] - timeline.request.arrival_s


def tpot_s(timeline: Timeline) -> float:
    """Time per output token after the first: (last - first) / (n - 1); 0 if n is 1.

    Raises:
      ValueError: if there is no token yet.
    """
    stamps = _stamps(timeline)
    if len(stamps) == 1:
        return 0.0
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def itl_s(timeline: Timeline) -> list[float]:
    """Inter-token latencies: the n - 1 gaps between consecutive tokens."""
    return [later - sooner for sooner, later in itertools.pairwise(timeline.token_s)]


def pooled_itl_s(timelines: Iterable[Timeline]) -> NDArray[np.float64]:
    """The inter-token latencies of all requests, in their order."""
    lists = [t.token_s for t in timelines if t.token_s]
    if not lists:
        return np.empty(0)
    stamps = array.array("d")
    for token_s in lists:
        stamps.fromlist(token_s)  # twice as fast as any of numpy's ways
    gaps_s = np.diff(np.frombuffer(stamps))
    ends = np.cumsum([len(token_s) for token_s in lists])
    return np.delete(gaps_s, ends[:-1] - 1)  # there is no gap between two requests


def e2e_s(timeline: Timeline) -> float:
    """End-to-end latency of a finished request: last token - arrival.

    Raises:
      ValueError: if the request has not finished.
    """
    _check_finished(timeline)
    return _stamps(timeline)[-1] - timeline.request.arrival_s


@dataclasses.dataclass(kw_only=True, slots=True)  # frozen takes five times as long
class Stages:
    """Where the end-to-end latency of one request went; the five sum to `e2e_s`.

    The stages are those of DistServe's Fig. 10 (there: prefill queuing, prefill
    execution, transmission, decoding queuing, decoding execution).
    """

    prefill_queue_s: float  # arrival -> first prompt token goes to a device
    prefill_s: float  # -> first token
    transfer_s: float  # KV on the way, while the request waits for it
    decode_queue_s: float  # first token -> first decode step, less the transfer
    decode_s: float  # -> last token


def stages_s(timeline: Timeline) -> Stages:
    """The five stages of a finished request, none negative.

    A transfer counts only between the first token and the first decode step: the part
    of a streamed transfer that overlaps prefill costs the request nothing. A one-token
    request ends with its prefill: the later stages are 0.

    Raises:
      ValueError: if the request has not finished, or its stamps are missing or out of
        order.
    """
    arrival, start, first, decode, last = _stage_bounds(timeline)
    transfer_start, transfer_end = _exposed_transfer(timeline, first, decode)
    return Stages(
        prefill_queue_s=start - arrival,
        prefill_s=first - start,
        transfer_s=transfer_end - transfer_start,
        # Both waits, before the pull and after it. Written as a sum of differences of
        # ordered stamps, rounding cannot make it negative.
        decode_queue_s=(transfer_start - first) + (decode - transfer_end),
        decode_s=last - decode,
    )


def stage_spans_s(timeline: Timeline) -> list[tuple[str, float, float]]:
    """The stages of a request that has ended: (a field of `Stages`, start, end).

    They come in order, without gaps or empty ones, and end with the request: those of a
    finished one are its `stages_s`, where the decode queue may come twice, before the
    transfer and after it.

    Raises:
      ValueError: if the request has not ended.
    """
    end = timeline.end_s
    if end is None:
        raise ValueError(
            f"request {timeline.request.id}: expected one that has ended, got status "
            f"{timeline.status}"
        )
    begins: list[tuple[str, float | None]] = [
        ("prefill_queue_s", timeline.request.arrival_s),
        ("prefill_s", timeline.prefill_start_s),
    ]
    if timeline.token_s:
        first, decode = timeline.token_s[0], timeline.decode_start_s
        until = end if decode is None else decode
        transfer_start, transfer_end = _exposed_transfer(timeline, first, until)
        begins += [
            ("decode_queue_s", first),
            ("transfer_s", transfer_start),
            ("decode_queue_s", transfer_end),
            ("decode_s", decode),
        ]
    reached = [(name, start) for name, start in begins if start is not None]
    ends = [*(start for _, start in reached[1:]), end]
    spans = [(*stage, end) for stage, end in zip(reached, ends, strict=True)]
    return [(name, start, end) for name, start, end in spans if end > start]


def _stage_bounds(timeline: Timeline) -> tuple[float, float, float, float, float]:
    """Arrival, prefill start, first token, decode start, last token; checked."""
    _check_finished(timeline)
    stamps = _stamps(timeline)
    arrival, first, last = timeline.request.arrival_s, stamps[0], stamps[-1]
    start, decode = timeline.prefill_start_s, timeline.decode_start_s
    if len(stamps) == 1:
        decode = last
    if (
        start is None
        or decode is None
        or not arrival <= start <= first <= decode <= last
    ):
        raise ValueError(
            f"request {timeline.request.id}: expected arrival <= prefill start <= "
            f"first token <= decode start <= last token, got "
            f"{(arrival, start, first, decode, last)}"
        )
    return arrival, start, first, decode, last


def _exposed_transfer(
    timeline: Timeline, first_s: float, decode_s: float
) -> tuple[float, float]:
    """Start and end of the transfer, cut to [first_s, decode_s]; empty if none."""
    start, end = timeline.transfer_start_s, timeline.transfer_end_s
    if start is None or end is None:
        return first_s, first_s
    start = min(max(start, first_s), decode_s)
    return start, min(max(end, start), decode_s)


def _stamps(timeline: Timeline) -> list[float]:
    if not timeline.token_s:
        raise ValueError(
            f"request {timeline.request.id}: expected at least one token, got none "
            f"(status {timeline.status})"
        )
    return timeline.token_s


def _check_finished(timeline: Timeline) -> None:
    if timeline.status is not Status.FINISHED:
        raise ValueError(
            f"request {timeline.request.id}: expected a finished request, got status "
            f"{timeline.status}"
        )


# ---- targets and attainment ----------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SLO:
    """The two latency targets of a service; `math.inf` means no target."""

    ttft_s: float  # > 0
    tpot_s: float  # > 0

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if not value > 0:
                raise ValueError(f"SLO {name}: expected > 0 seconds, got {value}")

    def scaled(self, factor: float) -> SLO:
        """Both targets times `factor` (the "SLO scale" of DistServe's Figs. 8, 9)."""
        return SLO(ttft_s=self.ttft_s * factor, tpot_s=self.tpot_s * factor)


def meets_ttft(timeline: Timeline, slo: SLO) -> bool:
    """Whether the request finished and its first token was in time."""
    return timeline.status is Status.FINISHED and ttft_s(timeline) <= slo.ttft_s


def meets_tpot(timeline: Timeline, slo: SLO) -> bool:
    """Whether the request finished and its later tokens were fast enough on average."""
    return timeline.status is Status.FINISHED and tpot_s(timeline) <= slo.tpot_s


def meets(timeline: Timeline, slo: SLO) -> bool:
    """Whether the request is good: finished, with both targets met."""
    return meets_ttft(timeline, slo) and meets_tpot(timeline, slo)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attainment:
    """Shares, in [0, 1], of the requests that arrived."""

    joint: float  # met both targets
    ttft_only: float  # met the TTFT target, whatever their TPOT
    tpot_only: float  # met the TPOT target, whatever their TTFT


def attainment(timelines: Sequence[Timeline], slo: SLO) -> Attainment:
    """The share of arrived requests that met the targets.

    Raises:
      ValueError: if there are no requests.
    """
    arrived = len(timelines)
    if arrived == 0:
        raise ValueError("attainment: expected at least one request, got none")
    return Attainment(
        joint=sum(meets(t, slo) for t in timelines) / arrived,
        ttft_only=sum(meets_ttft(t, slo) for t in timelines) / arrived,
        tpot_only=sum(meets_tpot(t, slo) for t in timelines) / arrived,
    )


# ---- uncertainty ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its confidence interval; None where the values cannot give one."""

    mean: float
    low: float | None
    high: float | None


def interval_across(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student-t interval for the mean of independent runs (one value per seed).

    Values that are all equal give an interval of width 0; for attainments near 1 from a
    few seeds that is optimistic.

    Raises:
      ValueError: on no values, or a `confidence` outside (0, 1).
    """
    if len(values) == 0:
        raise ValueError("interval: expected at least one value, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean=mean, low=None, high=None)
    half = _half_width(values, confidence)
    return Interval(mean=mean, low=mean - half, high=mean + half)


def rate_interval(values: Sequence[float], *, independent: bool = True) -> Interval:
    """`interval_across` for what cannot be negative: it begins at 0 or above.

    Args:
      independent: False where runs share what they are samples of, as rows of a trace:
        then there is a mean and no interval.
    """
    found = interval_across(values)
    if found.low is None or not independent:
        return Interval(mean=found.mean, low=None, high=None)
    return Interval(mean=found.mean, low=max(0.0, found.low), high=found.high)


def batch_means(
    flags: Sequence[float], batches: int = 10, confidence: float = 0.95
) -> Interval:
    """Interval for the mean of one run's `flags` (1 good, 0 not) in arrival order.

    The run is cut into contiguous batches, equal to within one request, whose means are
    treated as independent; each must therefore outlast the queue's memory. At 100
    requests a batch this is too narrow at high load (module docstring): it serves where
    a second seed cannot be had.

    Raises:
      ValueError: if `batches` < 2, or there are fewer flags than batches.
    """
    if not 2 <= batches <= len(flags):
        raise ValueError(
            f"batches: expected from 2 to the {len(flags)} flags, got {batches}"
        )
    values = np.asarray(flags, dtype=np.float64)
    means = [float(part.mean()) for part in np.array_split(values, batches)]
    half = _half_width(means, confidence)
    mean = float(values.mean())  # of the run, not of slightly unequal batches
    return Interval(mean=mean, low=max(0.0, mean - half), high=mean + half)


def _half_width(values: Sequence[float], confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected in (0, 1), got {confidence}")
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return _t_quantile((1 + confidence) / 2, len(values) - 1) * error


def _t_quantile(probability: float, degrees: int) -> float:
    # scipy.special, as scipy.stats takes most of a second to import.
    return float(stdtrit(degrees, probability))  # pyright: ignore


# ---- backlog -------------------------------------------------------------------------


def is_steady(timelines: Sequence[Timeline], tolerance: float = 0.05) -> bool:
    """Whether the system kept up: no growing backlog while requests arrived.

    Compares the mean number of requests in the system (arrived and not ended) at the
    arrivals of the last quarter and at those of the second; the first is warm-up.
    About n / 2 requests arrive from the middle of one to the middle of the other.
    Steady means that at most `tolerance` of them were added to the backlog: 0.05 is the
    growth when the load offered is 1.05 times the capacity.

    The answer is a noisy one near capacity. M/D/1 queues called steady, of 300 runs:

        utilisation    .7    .85   .95   1.1   1.3
        n = 1000       100   100   99    11    0 %
        n = 300        100   98    86    29    0 %
        n = 100        97    79    68    33    4 %

    The run must also be many times as long as one request's life: the filling of an
    empty system is growth too. Fewer than 4 requests show nothing: False.
    """
    in_system = _in_system_at_arrivals(timelines)
    quarter = len(in_system) // 4
    if quarter == 0:
        return False
    growth = np.mean(in_system[-quarter:]) - np.mean(in_system[quarter : 2 * quarter])
    return bool(growth <= tolerance * len(in_system) / 2)


def _in_system_at_arrivals(timelines: Sequence[Timeline]) -> Sequence[int]:
    """Requests in the system just after each arrival, the new one included."""
    arrivals = np.sort([t.request.arrival_s for t in timelines])
    ends = np.sort([t.end_s for t in timelines if t.end_s is not None])
    arrived = np.searchsorted(arrivals, arrivals, side="right")
    return (arrived - np.searchsorted(ends, arrivals, side="right")).tolist()


# ---- goodput -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """The highest rate that still attains the target, and the rates it lies between."""

    rate_rps: float  # per device if the given rates were; 0 if the lowest rate failed
    pass_rps: float | None  # highest passing rate below the first failure
    fail_rps: float | None  # lowest failing rate

    @property
    def bracketed(self) -> bool:
        """Whether a pass and a failure were both seen.

        Otherwise `rate_rps` is a lower bound only: the sweep was too high or too low.
        """
        return self.pass_rps is not None and self.fail_rps is not None


def goodput(points: Iterable[tuple[float, float]], target: float = 0.9) -> Goodput:
    """The first crossing of `target` by attainment over rate, for one seed.

    `points` are (rate_rps, attainment) in any order. Going up in rate, the first point
    below the target ends the search: a later pass is luck, since a higher rate cannot
    be served better, and counting it would reward trying many rates. The price is a
    bias downwards where attainment is noisy near the target and the grid is fine;
    longer runs cure it, and the interval over seeds shows it. Between the last pass and
    the first failure the rate is interpolated linearly, as in DistServe's plots.

    Raises:
      ValueError: on no points, a rate given twice or not > 0, an attainment outside
        [0, 1], or a target outside (0, 1].
    """
    ordered = sorted(points)
    _check_points(ordered, target)
    passed: tuple[float, float] | None = None
    for rate, share in ordered:
        if share < target:
            return _crossing(passed, (rate, share), target)
        passed = (rate, share)
    assert passed is not None  # there is a point, and none failed
    return Goodput(rate_rps=passed[0], pass_rps=passed[0], fail_rps=None)


def _crossing(
    passed: tuple[float, float] | None, failed: tuple[float, float], target: float
) -> Goodput:
    if passed is None:
        return Goodput(rate_rps=0.0, pass_rps=None, fail_rps=failed[0])
    (pass_rps, high), (fail_rps, low) = passed, failed
    rate = pass_rps + (fail_rps - pass_rps) * (high - target) / (high - low)
    return Goodput(rate_rps=rate, pass_rps=pass_rps, fail_rps=fail_rps)


def _check_points(points: Sequence[tuple[float, float]], target: float) -> None:
    if not points:
        raise ValueError("goodput: expected at least one (rate, attainment), got none")
    if not 0 < target <= 1:
        raise ValueError(f"target: expected in (0, 1], got {target}")
    for rate, share in points:
        if not rate > 0 or not 0 <= share <= 1:
            raise ValueError(
                f"goodput: expected rate > 0 and attainment in [0, 1], "
                f"got ({rate}, {share})"
            )
    for (rate, _), (after, _) in itertools.pairwise(points):
        if rate == after:
            raise ValueError(f"goodput: expected each rate once, got {rate} twice")


def is_resolved(at_pass: Interval, at_fail: Interval, target: float = 0.9) -> bool:
    """Whether the runs were long and many enough to decide a goodput.

    True if the interval at the highest passing rate lies at or above the target, and
    that at the lowest failing rate below it. An unknown interval decides nothing.
    """
    if at_pass.low is None or at_fail.high is None:
        return False
    return at_pass.low >= target > at_fail.high
