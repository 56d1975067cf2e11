"""Bounds on percentiles of latencies, and the latencies that are bounded.

"P99 of x <= bound" means that at least 99 % of the x are <= bound. So a percentile is a
value that occurs, while `summary` interpolates between two values.

Only a FINISHED request has latencies. The latencies of any other request are `MISSED`:
its TTFT, its scheduling delay, and each of the `max_tokens` - 1 gaps it should have
had. If they were left out, a system could pass by refusing requests. A one-token
request has no gap: it is in no percentile of TPOT or of gaps. A bound on no values is
met.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.request import Status, Timeline

MISSED = math.nan  # within no limit, not even an infinite one

# The latencies of one request that a percentile is taken of, pooled over requests.
Latencies = Callable[[Timeline], Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """At least `share` of the latencies must be at most `limit`."""

    what: str  # what the latencies are called
    latencies: Latencies
    share: float  # (0, 1]: 0.99 bounds P99
    limit: float  # seconds; of a slowdown, its factor
    is_factor: bool = False

    def __post_init__(self) -> None:
        require(
            0 < self.share <= 1, f"{self.what} share: expected in (0, 1]", self.share
        )
        require(self.limit > 0, f"{self.what} limit: expected > 0", self.limit)

    def met_by(self, latencies: Sequence[float]) -> float:
        """Return the share of a run's latencies within the limit."""
        limit = self.limit
        return share_of([value <= limit for value in latencies])

    def __str__(self) -> str:
        limit = f"{self.limit:g}x" if self.is_factor else in_ms(self.limit)
        return f"P{100 * self.share:g} {self.what} <= {limit}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PercentileBounds:
    """A criterion that passes if all bounds are met.

    The score is the share within the bound that is closest to failing. To compare
    bounds that need different shares, each share is put on the scale of the strictest
    bound, whose share is the target: linearly from [0, needed] to [0, target] and from
    [needed, 1] to [target, 1]. So the score passes exactly if every bound is met.
    """

    bounds: tuple[Bound, ...]
    unit = "requests/s"

    @property
    def target(self) -> float:
        return max(bound.share for bound in self.bounds)

    def score(self, run: Sequence[Timeline]) -> float:
        pooled = {  # once each, though several percentiles may be bounded
            latencies: [value for timeline in run for value in latencies(timeline)]
            for latencies in {bound.latencies for bound in self.bounds}
        }
        return min(
            _rescaled(bound.met_by(pooled[bound.latencies]), bound.share, self.target)
            for bound in self.bounds
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.bounds))


def _rescaled(share: float, needed: float, target: float) -> float:
    if needed == target:
        return share
    if share < needed:
        return share / needed * target
    return target + (share - needed) / (1 - needed) * (1 - target)


# ---- latencies of a request ----------------------------------------------------------


def ttft(timeline: Timeline) -> Sequence[float]:
    """Return the TTFT."""
    return [metrics.ttft_s(timeline)] if finished(timeline) else [MISSED]


def scheduling_delay(timeline: Timeline) -> Sequence[float]:
    """Return the time from arrival until the first prompt token goes to a device."""
    if not finished(timeline):
        return [MISSED]
    return [metrics.stages_s(timeline).prefill_queue_s]


def tpot(timeline: Timeline) -> Sequence[float]:
    """Return the mean gap, if there is a gap."""
    if not finished(timeline):
        return [MISSED] if timeline.request.max_tokens > 1 else []
    return [metrics.tpot_s(timeline)] if len(timeline.token_s) > 1 else []


def tbt(timeline: Timeline) -> Sequence[float]:
    """Return every gap between two tokens."""
    if not finished(timeline):
        return [MISSED] * (timeline.request.max_tokens - 1)
    return metrics.itl_s(timeline)


def e2e(timeline: Timeline) -> Sequence[float]:
    """Return the end-to-end latency."""
    return [metrics.e2e_s(timeline)] if finished(timeline) else [MISSED]


def finished(timeline: Timeline) -> bool:
    return timeline.status is Status.FINISHED


def share_of(flags: Sequence[bool]) -> float:
    """Return the share of true flags; 1 without flags."""
    return sum(flags) / len(flags) if flags else 1.0


def in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
