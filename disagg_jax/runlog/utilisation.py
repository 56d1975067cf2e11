"""Utilisation: the work of every device and link, read from an event log."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from disagg_jax.deployment import Deployment
from disagg_jax.errors import require
from disagg_jax.runlog.event_log import (
    LoggedStep,
    LoggedTransfer,
    LoggedWork,
    read_turns,
)
from disagg_jax.work import (
    Done,
    Down,
    Event,
    Progress,
    StageFree,
    Straggle,
    TruncateSpan,
    Up,
)


@dataclasses.dataclass(frozen=True)
class StageUse:
    """A step, or an iteration of a span, on the devices of one pipeline stage."""

    step: LoggedStep
    stage: int
    start_s: float
    end_s: float
    iteration: int = 0
    lost: bool = False  # whether its instance was lost before the step was done


@dataclasses.dataclass(frozen=True)
class LinkUse:
    """A transfer from the first byte to the last.

    A transfer that goes along with its step includes waits for KV not yet computed.
    """

    transfer: LoggedTransfer
    start_s: float
    end_s: float
    bytes: int = 0
    # Whether one of its instances was lost, at `end_s`. Its beginning is unknown then,
    # since it may have waited for the link, so `start_s` is `end_s`.
    lost: bool = False


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """The work and the changes of a deployment's devices and links in one run."""

    stages: list[StageUse] = dataclasses.field(default_factory=list[StageUse])
    links: list[LinkUse] = dataclasses.field(default_factory=list[LinkUse])
    changes: list[tuple[float, Down | Straggle | Up]] = dataclasses.field(
        default_factory=list[tuple[float, Down | Straggle | Up]]
    )


def read_occupancy(deployment: Deployment, lines: Iterable[str]) -> Occupancy:
    """Read the occupancy of a deployment from the event log of a whole run.

    Work of a lost instance's steps on later stages is unknown and left out.

    Raises:
      ValueError: if the log is not of `deployment`, or work in it never ends.
    """
    reader = _Reader(deployment)
    for now_s, events, works in read_turns(lines):
        for event in events:
            reader.tell(now_s, event)
        for work in works:
            reader.start(now_s, work)
    never = sorted(reader.in_flight)
    require(not never, "event log: expected all work to end, but some does not", never)
    return reader.found


@dataclasses.dataclass
class _InFlight:
    work: LoggedStep | LoggedTransfer
    start_s: float
    ends_s: list[float] = dataclasses.field(default_factory=list[float])  # of a span
    freed_s: float | None = None  # when it left the first stage


class _Reader:
    def __init__(self, deployment: Deployment):
        self._deployment = deployment
        self.found = Occupancy()
        self.in_flight: dict[int, _InFlight] = {}
        self._free_s: dict[tuple[int, int], float] = {}  # by (instance, stage)

    def start(self, now_s: float, work: LoggedWork) -> None:
        if isinstance(work, TruncateSpan):
            flight = self.in_flight[work.work]
            if len(flight.ends_s) == work.iterations:  # no Done follows
                self._end_span(self.in_flight.pop(work.work))
            return
        have = len(self._deployment.instances)
        expected = f"event log: expected one of the {have} instances of the deployment"
        require(max(work.instances) < have, expected, max(work.instances))
        self.in_flight[work.id] = _InFlight(work, now_s)

    def tell(self, now_s: float, event: Event) -> None:
        if isinstance(event, Done):
            self._done(self.in_flight.pop(event.work), event)
        elif isinstance(event, Progress):
            self.in_flight[event.work].ends_s += event.ends_s
        elif isinstance(event, StageFree):
            self.in_flight[event.work].freed_s = now_s
        elif isinstance(event, Down | Straggle | Up):
            self.found.changes.append((now_s, event))
            if isinstance(event, Down):
                self._lose(now_s, event.instance)

    def _done(self, flight: _InFlight, event: Done) -> None:
        work, flight.start_s = flight.work, event.start_s
        if isinstance(work, LoggedTransfer):
            use = LinkUse(work, event.start_s, event.end_s, event.bytes)
            self.found.links.append(use)
        elif work.iterations > 1:
            flight.ends_s += event.ends_s
            self._end_span(flight)
        else:
            self._pass_stages(work, event)

    def _pass_stages(self, step: LoggedStep, event: Done) -> None:
        """Add a step to each stage, from its end on the stage before, in turn."""
        ends_s, start_s = (*event.stage_ends_s, event.end_s), event.start_s
        stages = self._deployment.instances[step.instance].parallelism.pp
        expected = f"event log: expected step {step.id} to pass {stages} stages"
        require(len(ends_s) == stages, expected, len(ends_s))
        for stage, end_s in enumerate(ends_s):
            place = step.instance, stage
            start_s = max(start_s, self._free_s.get(place, 0.0))
            # A real clock learns of ends in any order.
            start_s = min(start_s, end_s)
            self.found.stages.append(StageUse(step, stage, start_s, end_s))
            self._free_s[place] = start_s = end_s

    def _end_span(self, flight: _InFlight) -> None:
        assert isinstance(flight.work, LoggedStep)
        bounds = itertools.pairwise((flight.start_s, *flight.ends_s))
        for i, (start_s, end_s) in enumerate(bounds):
            self.found.stages.append(StageUse(flight.work, 0, start_s, end_s, i))

    def _lose(self, now_s: float, instance: int) -> None:
        for id, flight in list(self.in_flight.items()):
            work = flight.work
            if instance not in work.instances:
                continue
            del self.in_flight[id]
            if isinstance(work, LoggedTransfer):
                self.found.links.append(LinkUse(work, now_s, now_s, lost=True))
                continue
            self._end_span(flight)
            if flight.ends_s and flight.ends_s[-1] == now_s:
                continue  # the next iteration had not begun
            start_s = flight.ends_s[-1] if flight.ends_s else flight.start_s
            end_s = now_s if flight.freed_s is None else flight.freed_s
            iteration = len(flight.ends_s)
            use = StageUse(work, 0, start_s, end_s, iteration, lost=True)
            self.found.stages.append(use)
