"""Latencies of one request: TTFT, TPOT, ITL, E2E, and its five stages."""

from __future__ import annotations

import array
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from disagg_jax.request import Status, Timeline


def ttft_s(timeline: Timeline) -> float:
    """Return the time to first token: first token - arrival.

    Raises:
      ValueError: if there is no token yet.
    """
    return _stamps(timeline)[0] - timeline.request.arrival_s


def tpot_s(timeline: Timeline) -> float:
    """Return the mean gap between output tokens: (last - first) / (n - 1); 0 if n is 1.

    Raises:
      ValueError: if there is no token yet.
    """
    stamps = _stamps(timeline)
    if len(stamps) == 1:
        return 0.0
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def itl_s(timeline: Timeline) -> list[float]:
    """Return the inter-token latencies: the n - 1 gaps between consecutive tokens."""
    return [later - sooner for sooner, later in itertools.pairwise(timeline.token_s)]


def pooled_itl_s(timelines: Iterable[Timeline]) -> NDArray[np.float64]:
    """Return the inter-token latencies of all requests, in the order of requests."""
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
    """Return the end-to-end latency of a finished request: last token - arrival.

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
    """Divide the latency of a finished request into five stages, none negative.

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
    """Return (field of `Stages`, start, end) for each stage of an ended request.

    The spans are in order, without gaps and never empty, and the last one ends with the
    request. For a finished request their durations are `stages_s`; the decode queue may
    come twice, before the transfer and after it.

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
    """Return arrival, prefill start, first token, decode start and last token."""
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
    """Clip the transfer to [first_s, decode_s]; without one, return an empty span."""
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
