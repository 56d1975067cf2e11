"""Targets, the share of requests that meet them, and whether the system kept up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from disagg_jax.metrics.latency import tpot_s, ttft_s
from disagg_jax.request import Status, Timeline


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SLO:
    """The two latency targets of a service; `math.inf` means no target."""

    ttft_s: float  # > 0
    tpot_s: float  # > 0

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if not value > 0:
                raise ValueError(f"SLO {name}: expected > 0 seconds, got {value}")

    @classmethod
    def parse(cls, text: str) -> SLO:
        """Read 'TTFT_S,TPOT_S'.

        Raises:
          ValueError: on any other text.
        """
        try:
            ttft_s, tpot_s = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"slo: expected TTFT_S,TPOT_S, got '{text}'") from None
        return cls(ttft_s=ttft_s, tpot_s=tpot_s)

    def __str__(self) -> str:
        return f"TTFT <= {self.ttft_s:g} s, TPOT <= {self.tpot_s:g} s"

    def scaled(self, factor: float) -> SLO:
        """Multiply both targets by `factor` (the "SLO scale" of DistServe's Fig. 8)."""
        return SLO(ttft_s=self.ttft_s * factor, tpot_s=self.tpot_s * factor)


def meets_ttft(timeline: Timeline, slo: SLO) -> bool:
    """Return whether the request finished and its first token was in time."""
    return timeline.status is Status.FINISHED and ttft_s(timeline) <= slo.ttft_s


def meets_tpot(timeline: Timeline, slo: SLO) -> bool:
    """Return whether the request finished with a TPOT within the target."""
    return timeline.status is Status.FINISHED and tpot_s(timeline) <= slo.tpot_s


def meets(timeline: Timeline, slo: SLO) -> bool:
    """Return whether the request is good: finished, with both targets met."""
    return meets_ttft(timeline, slo) and meets_tpot(timeline, slo)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attainment:
    """Shares, in [0, 1], of the requests that arrived."""

    joint: float  # met both targets
    ttft_only: float  # met the TTFT target, whatever their TPOT
    tpot_only: float  # met the TPOT target, whatever their TTFT


def attainment(timelines: Sequence[Timeline], slo: SLO) -> Attainment:
    """Return the shares of arrived requests that met the targets.

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


def is_steady(timelines: Sequence[Timeline], tolerance: float = 0.05) -> bool:
    """Return whether the backlog stopped growing while requests arrived.

    Compare the mean number of requests in the system (arrived and not ended) at the
    arrivals of the last quarter with the mean at the arrivals of the second quarter;
    the first quarter is warm-up. About n / 2 requests arrive from the middle of one
    quarter to the middle of the other. A run is steady if at most `tolerance` of these
    requests joined the backlog: 0.05 is the growth at 1.05 times the capacity.

    The answer is noisy near capacity. Share of 300 M/D/1 runs called steady:

        utilisation    .7    .85   .95   1.1   1.3
        n = 1000       100   100   99    11    0 %
        n = 300        100   98    86    29    0 %
        n = 100        97    79    68    33    4 %

    The run must also be many times as long as the life of one request, since an empty
    system that fills up grows too. Fewer than 4 requests give False.
    """
    in_system = _in_system_at_arrivals(timelines)
    quarter = len(in_system) // 4
    if quarter == 0:
        return False
    growth = np.mean(in_system[-quarter:]) - np.mean(in_system[quarter : 2 * quarter])
    return bool(growth <= tolerance * len(in_system) / 2)


def _in_system_at_arrivals(timelines: Sequence[Timeline]) -> Sequence[int]:
    """Count the requests in the system just after each arrival, itself included."""
    arrivals = np.sort([t.request.arrival_s for t in timelines])
    ends = np.sort([t.end_s for t in timelines if t.end_s is not None])
    arrived = np.searchsorted(arrivals, arrivals, side="right")
    return (arrived - np.searchsorted(ends, arrivals, side="right")).tolist()
