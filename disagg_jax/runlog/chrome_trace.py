"""A run as a picture, in the Trace Event Format of Perfetto and chrome://tracing.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment
from disagg_jax.errors import require
from disagg_jax.metrics import stage_spans_s
from disagg_jax.request import Status, Timeline
from disagg_jax.runlog.event_log import LoggedStep
from disagg_jax.runlog.utilisation import LinkUse, Occupancy, StageUse, read_occupancy
from disagg_jax.work import Straggle

TraceEvent = dict[str, Any]

PROCESSES = ("devices", "links", "requests")  # in the order they are shown


def chrome_trace(
    deployment: Deployment,
    lines: Iterable[str],
    timelines: Sequence[Timeline],
    about: Mapping[str, Any] | None = None,
) -> TraceEvent:
    """Return a run as a JSON object with a lane for every device, link and request.

    A device shows its steps, a span as its iterations. A link shows its transfers, in
    as many lanes as there were at once. A request shows its five stages. An arrow goes
    from a transfer to its request.

    Args:
      lines: the run's event log.
      timelines: of all requests of the run, each of which has ended.
      about: describes the run in the file, for a reader who opens it later.

    Raises:
      ValueError: if the log is not of a whole run of `deployment`, or has requests
        without a timeline.
    """
    occupancy = read_occupancy(deployment, lines)
    found = {id for use in occupancy.stages for id, _, _ in use.step.slices}
    missing = sorted(found - {timeline.request.id for timeline in timelines})
    require(
        not missing,
        "timelines: expected those of all requests, but some are missing",
        missing,
    )
    lanes = _Lanes()
    events = [
        *_device_events(lanes, deployment, occupancy, timelines),
        *_request_events(lanes, timelines),
        *_link_events(lanes, occupancy.links, timelines),
    ]
    # At one instant: events without duration, then a slice, then slices inside it.
    events.sort(key=lambda event: (event["ts"], event.get("dur", math.inf)))
    return {
        "traceEvents": lanes.names + events,
        "displayTimeUnit": "ms",
        "otherData": {"deployment": str(deployment), **(about or {})},
    }


class _Lanes:
    """The lanes so far: their numbers, and the events that name them."""

    def __init__(self) -> None:
        self.names: list[TraceEvent] = []
        self._places: dict[tuple[str, object], TraceEvent] = {}
        # A lane with the number of its process would be shown as its main thread.
        self._numbers = itertools.count(len(PROCESSES) + 1)
        for pid, process in enumerate(PROCESSES, 1):
            self._name("process", {"pid": pid}, process, pid)

    def place(self, process: str, of: object, name: str) -> TraceEvent:
        """Return the "pid" and "tid" of a lane; add a new lane below its process's."""
        place = self._places.get((process, of))
        if place is None:
            pid = PROCESSES.index(process) + 1
            place = {"pid": pid, "tid": next(self._numbers)}
            self._places[process, of] = place
            self._name("thread", place, name, place["tid"])
        return place

    def _name(self, kind: str, place: TraceEvent, name: str, index: int) -> None:
        for what, args in (
            ("name", {"name": name}),
            ("sort_index", {"sort_index": index}),
        ):
            event = {"ph": "M", "name": f"{kind}_{what}", **place, "args": args}
            self.names.append(event)


# -- devices -------------------------------------------------------------------------


def _device_lanes(
    lanes: _Lanes, deployment: Deployment
) -> dict[tuple[int, int], list[TraceEvent]]:
    """Return the lanes of the devices of each (instance, stage)."""
    found: dict[tuple[int, int], list[TraceEvent]] = {}
    for i, spec in enumerate(deployment.instances):
        one_stage = dataclasses.replace(spec.parallelism, pp=1)
        for stage in range(spec.parallelism.pp):
            name = f"{i} {spec.role} {one_stage} stage {stage} device "
            found[i, stage] = [
                lanes.place("devices", (i, stage, device), f"{name}{device}")
                for device in range(one_stage.devices)
            ]
    return found


def _device_events(
    lanes: _Lanes,
    deployment: Deployment,
    occupancy: Occupancy,
    timelines: Sequence[Timeline],
) -> Iterator[TraceEvent]:
    devices = _device_lanes(lanes, deployment)
    prompts = {t.request.id: t.request.prompt_tokens for t in timelines}
    for use in occupancy.stages:
        name, args = _describe(use, prompts)
        for lane in devices[use.step.instance, use.stage]:
            yield _slice(lane, name, use.start_s, use.end_s, args)
    for at_s, change in occupancy.changes:
        name = type(change).__name__.lower()
        if isinstance(change, Straggle):
            name = f"slow x{change.factor:g}"
        for stage in range(deployment.instances[change.instance].parallelism.pp):
            for lane in devices[change.instance, stage]:
                yield _instant(lane, name, at_s)


def _describe(
    use: StageUse, prompts: Mapping[int, int]
) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a slice and the details shown when it is selected."""
    step, slices = use.step, use.step.slices
    decodes = sum(
        count == 1 and start >= prompts[request] for request, start, count in slices
    )
    args: dict[str, Any] = {
        "step": step.id,
        "requests": [request for request, _, _ in slices],
        "tokens": sum(count for _, _, count in slices),
        "decodes": decodes,
    }
    if step.iterations > 1:
        args |= {"iteration": use.iteration, "iterations": step.iterations}
    name = _kind(step, decodes, prompts)
    return (f"{name} (lost)" if use.lost else name), args


def _kind(step: LoggedStep, decodes: int, prompts: Mapping[int, int]) -> str:
    if decodes:
        return "decode" if decodes == len(step.slices) else "mixed"
    whole = all(
        start == 0 and count >= prompts[request]
        for request, start, count in step.slices
    )
    return "prefill" if whole else "chunk"


# -- requests and links --------------------------------------------------------------


def _request_events(
    lanes: _Lanes, timelines: Sequence[Timeline]
) -> Iterator[TraceEvent]:
    for timeline in timelines:
        request = timeline.request
        lane = lanes.place("requests", request.id, f"request {request.id}")
        size = {
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": len(timeline.token_s),
        }
        for stage, start_s, end_s in stage_spans_s(timeline):
            name = stage.removesuffix("_s").replace("_", " ")
            yield _slice(lane, name, start_s, end_s, size)
        for at_s in timeline.token_s[:1]:
            yield _instant(lane, "first token", at_s)
        for at_s in timeline.dropped_s:
            yield _instant(lane, "KV dropped", at_s)
        if timeline.status is not Status.FINISHED and timeline.end_s is not None:
            name = f"{timeline.status} {timeline.error}".strip()
            yield _instant(lane, name, timeline.end_s)


def _link_events(
    lanes: _Lanes, uses: Iterable[LinkUse], timelines: Sequence[Timeline]
) -> Iterator[TraceEvent]:
    ends_s = {timeline.request.id: timeline.end_s or 0.0 for timeline in timelines}
    ordered = sorted(uses, key=lambda use: (*use.transfer.instances, use.start_s))
    for link, group in itertools.groupby(ordered, lambda use: use.transfer.instances):
        free_s: list[float] = []  # when each lane of this link is free again
        for use in group:
            i = next((i for i, at_s in enumerate(free_s) if at_s <= use.start_s), None)
            if i is None:
                i = len(free_s)
                free_s.append(0.0)
            free_s[i] = use.end_s
            name = "{} -> {}".format(*link) + (f" ({i + 1})" if i else "")
            lane = lanes.place("links", (*link, i), name)
            if use.lost:
                yield _instant(lane, "transfer lost", use.end_s, _about_use(use))
                continue
            yield _slice(lane, "transfer", use.start_s, use.end_s, _about_use(use))
            request = use.transfer.request
            if use.start_s < ends_s[request]:
                of = lanes.place("requests", request, "")
                yield _arrow("s", lane, use)
                yield {**_arrow("f", of, use), "bp": "e"}  # to the slice around it


def _about_use(use: LinkUse) -> Mapping[str, Any]:
    transfer = use.transfer
    about = {
        "transfer": transfer.id,
        "request": transfer.request,
        "tokens": transfer.context,
        "bytes": use.bytes,
    }
    return {**about, "while_step": transfer.step} if transfer.step else about


# -- events --------------------------------------------------------------------------


def _slice(
    lane: TraceEvent, name: str, start_s: float, end_s: float, args: Mapping[str, Any]
) -> TraceEvent:
    # The end is rounded, not the duration: a slice that follows must not overlap.
    dur = _us(_ns(end_s) - _ns(start_s))
    event = {"ph": "X", "name": name, **lane, "ts": _us(_ns(start_s)), "dur": dur}
    return {**event, "args": args}


def _instant(
    lane: TraceEvent, name: str, at_s: float, args: Mapping[str, Any] | None = None
) -> TraceEvent:
    event = {"ph": "i", "s": "t", "name": name, **lane, "ts": _us(_ns(at_s))}
    return {**event, "args": args or {}}


def _arrow(phase: str, lane: TraceEvent, use: LinkUse) -> TraceEvent:
    name = {"name": "transfer", "cat": "transfer", "id": use.transfer.id}
    return {"ph": phase, **name, **lane, "ts": _us(_ns(use.start_s))}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _us(nanoseconds: int) -> float:
    """Return microseconds that Perfetto reads as exactly `nanoseconds`.

    Perfetto truncates (`static_cast<int64_t>(value * 1000)`): 1.001 would become 1000
    ns, and an event that seems to overlap another by 1 ns is not shown.
    """
    us = nanoseconds / 1e3
    return us if int(us * 1e3) == nanoseconds else math.nextafter(us, math.inf)
