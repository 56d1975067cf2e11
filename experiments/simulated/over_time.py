"""What requests met as time went on: latencies by arrival, and how many waited."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from disagg_jax.metrics import stage_spans_s
from disagg_jax.request import Status, Timeline
from experiments.report.panel import STAGES, XY

WINDOWS = 60  # of a run, each with percentiles and means of its own


def percentile_over_time(
    timelines: Sequence[Timeline],
    latency_s: Callable[[Timeline], float],
    percent: float,
) -> list[XY]:
    """Return (middle of a window of arrivals in s, percentile of its requests in s).

    The windows are equally long, from 0 to the last arrival. One in which no finished
    request arrived is left out.
    """
    found: dict[int, list[float]] = collections.defaultdict(list)
    end_s = max(t.request.arrival_s for t in timelines)
    width_s = end_s / WINDOWS or 1.0
    for timeline in timelines:
        if timeline.status is Status.FINISHED:
            window = min(WINDOWS - 1, int(timeline.request.arrival_s / width_s))
            found[window].append(latency_s(timeline))
    return [
        ((window + 0.5) * width_s, float(np.percentile(values_s, percent)))
        for window, values_s in sorted(found.items())
    ]


def counts_over_time(
    timelines: Sequence[Timeline], end_s: float
) -> dict[str, list[XY]]:
    """Return by stage (middle of a window in s, mean number of requests in the stage).

    The windows are equally long, from 0 to `end_s`.
    """
    spans: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
    for timeline in timelines:
        if timeline.status is Status.FINISHED:
            for name, start_s, stop_s in stage_spans_s(timeline):
                spans[name.removesuffix("_s")].append((start_s, stop_s))
    bounds_s = np.linspace(0.0, end_s or 1.0, WINDOWS + 1)
    middles_s = (bounds_s[:-1] + bounds_s[1:]) / 2
    return {
        stage: [*zip(middles_s.tolist(), _means(of, bounds_s), strict=True)]
        for stage, of in spans.items()
    }


def _means(
    spans: Sequence[tuple[float, float]], bounds_s: NDArray[np.float64]
) -> list[float]:
    """Return the mean number of spans at once between each two bounds."""
    starts_s, ends_s = np.array(spans).reshape(-1, 2).T
    spent_s = _since(starts_s, bounds_s) - _since(ends_s, bounds_s)
    return (np.diff(spent_s) / np.diff(bounds_s)).tolist()


def _since(
    stamps_s: NDArray[np.float64], times_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return at each time the seconds since each stamp before it, summed."""
    ordered = np.sort(stamps_s)
    past = np.searchsorted(ordered, times_s, side="right")
    return past * times_s - np.concatenate(([0.0], np.cumsum(ordered)))[past]
