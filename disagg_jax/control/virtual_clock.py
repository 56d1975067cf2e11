"""The virtual clock: an event heap that orders work without waiting for it."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import sys
from collections.abc import Iterator, Sequence

from disagg_jax.control.backend import Executor, Outcome
from disagg_jax.control.fifo_link import FifoLink
from disagg_jax.control.shared_link import SharedLink
from disagg_jax.errors import require
from disagg_jax.work import Done, Report, StageFree, Transfer, TruncateSpan, Work

# Iterations of a span that are timed at first; each time more are needed, their number
# doubles. Most spans are cut early.
_AHEAD = 16
_INFINITE = math.inf
_LAST = (sys.maxsize,)  # sorts behind all resources at one instant

# (instance,), (instance, stage) for its later stages, or the name of a link, by default
# (-3, src, dst). Names of links begin below 0, so that no instance has them.
Resource = tuple[int, ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Running:
    """A step in flight, timed as far as needed."""

    work: int
    resource: Resource  # the first stage of its instance
    start_s: float
    outcome: Outcome
    durations_s: Iterator[float]  # of the iterations not timed yet
    iterations: int
    factor: float  # on its durations
    ends_s: list[float] = dataclasses.field(default_factory=list[float])
    reported: int = 0  # iterations
    due_s: float = math.inf  # of its valid entry in the heap
    last_stage_s: float | None = None  # end of the last stage, if it is a later one
    # Of a step on several stages: (name, when the step enters, when it leaves) of each.
    stages_s: Sequence[tuple[Resource, float, float]] = ()


@dataclasses.dataclass(slots=True, eq=False)
class _Wire:
    """A link. Its one valid entry in the heap is the next end on it."""

    resource: Resource
    link: FifoLink | SharedLink
    due_s: float = math.inf


@dataclasses.dataclass(slots=True, eq=False)
class _Moving:
    """A transfer in flight, in as many parts as it has durations."""

    work: int
    instances: tuple[int, ...]
    wire: _Wire
    order: Resource  # among all entries due at one instant
    bytes: int
    durations_s: tuple[float, ...]
    # Of a transfer that goes along with a step: (when it is computed, seconds on the
    # link) of each part that has not come to the link yet.
    to_come: tuple[tuple[float, float], ...] = ()
    due_s: float = math.inf  # the first of these
    landed: int = 0  # parts
    start_s: float = 0.0


class VirtualBackend:
    """A `Backend` that computes the time.

    Each instance, and each link that is not shared, does one piece of work at a time,
    in order of submission; the executor gives the durations. With a cost model this is
    a discrete-event simulator. With an engine it is an execution-driven emulator:
    programs run alone, tokens are real, and each duration counts on the instance's own
    devices, so that one machine can measure a deployment of many devices. This does not
    hold for tensor parallelism over host devices, which share the cores.

    A pipelined instance has several steps in flight, one on each stage. Completions at
    one instant are reported in a fixed order: links, instances, KV that went along with
    a step.

    Attributes:
      busy_s: seconds of work of each resource.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._now_s = 0.0
        self._busy_until_s: dict[Resource, float] = {}
        self.busy_s: collections.defaultdict[Resource, float] = collections.defaultdict(
            float
        )
        self._heap: list[tuple[float, Resource, int, _Running | _Moving | _Wire]] = []
        self._spans: dict[int, _Running] = {}
        self._factors: dict[int, float] = {}  # of slow instances
        self._wires: dict[Resource, _Wire] = {}
        self._moving: dict[int, _Moving] = {}  # transfers in flight
        self._prompts: dict[int, _Running] = {}  # steps in flight with prompts

    def now_s(self) -> float:
        return self._now_s

    def submit(self, work: Work) -> None:
        if isinstance(work, TruncateSpan):
            self._cut(self._spans[work.work], work.iterations)
            return
        outcome = self._executor.run(work)
        if isinstance(work, Transfer):
            self._send(work, outcome)
            return
        resource = work.instances
        start_s = self._busy_until_s.get(resource, 0.0)
        running = _Running(
            work.id,
            resource,
            start_s if start_s > self._now_s else self._now_s,
            outcome,
            iter(outcome.durations_s),
            work.iterations,
            self._factors.get(work.instance, 1.0),
        )
        if work.load.chunks:
            self._prompts[work.id] = running
        self._time(running)
        if running.iterations > 1:
            self._spans[work.id] = running
            return
        self._busy_until_s[resource] = running.due_s
        if outcome.later_stages_s:
            self._pass_stages(running, outcome.later_stages_s)

    def wait(self, until_s: float) -> list[Report]:
        """Advance to the next instant with completions, or to `until_s`."""
        done: list[Report] = []
        while self._heap and self._heap[0][0] <= until_s:
            end_s, _, _, item = heapq.heappop(self._heap)
            if item.due_s != end_s:
                continue  # cut, dropped, or another transfer ends first now
            if isinstance(item, _Running):
                if len(item.ends_s) < item.iterations:
                    self._time(item)
                    continue
                report = self._step_over(item, end_s)
            elif isinstance(item, _Moving):
                self._part_computed(item)
                continue
            else:
                landed = self._part_landed(item)
                if landed is None:
                    continue
                report = landed
            self._now_s = until_s = end_s
            done.append(report)
        if not done and until_s < math.inf:
            self._now_s = max(self._now_s, until_s)
        return done

    def progress(self, work: int) -> Sequence[float]:
        running = self._spans.get(work)
        if running is None:  # submitted in this turn, or no span any more
            return ()
        first = last = running.reported
        while running.ends_s[last] <= self._now_s:
            last += 1
        running.reported = last
        return running.ends_s[first:last]

    def slow(self, instance: int, factor: float) -> None:
        if not 0 < factor < math.inf:
            raise ValueError(f"slow: expected a finite factor > 0, got {factor}")
        self._factors[instance] = factor

    def drop(self, instance: int) -> None:
        for _, _, _, item in self._heap:
            if isinstance(item, _Running) and item.resource[0] == instance:
                item.due_s = math.inf
                if self._spans.pop(item.work, None) is not None:
                    self._count_told(item)
                self._prompts.pop(item.work, None)
        for resource in self._busy_until_s:
            if resource[0] == instance:
                self._busy_until_s[resource] = self._now_s
        for moving in list(self._moving.values()):
            if instance in moving.instances:
                del self._moving[moving.work]
                moving.due_s = math.inf
                moving.wire.link.drop(self._now_s, moving.work)
                self._await_end(moving.wire)

    # -- transfers --------------------------------------------------------------------

    def _send(self, work: Transfer, outcome: Outcome) -> None:
        """Put a transfer on its link: all of it now, or each part as it is computed.

        A part comes to the link behind all other events of its instant, so that KV
        lands after it was computed.
        """
        wire = self._wire(outcome.link or (-3, work.src, work.dst), outcome.shared)
        durations_s = tuple(outcome.durations_s)
        for duration_s in durations_s:
            _check_duration(work.id, duration_s)
        order = (*_LAST, *wire.resource) if work.step else wire.resource
        moving = _Moving(
            work.id, work.instances, wire, order, outcome.bytes, durations_s
        )
        self._moving[work.id] = moving
        if work.step:
            computed_s = _parts_computed_s(self._prompts[work.step], len(durations_s))
            moving.to_come = tuple(zip(computed_s, durations_s, strict=True))
            self._await_part(moving)
        else:
            for duration_s in durations_s:
                wire.link.add(self._now_s, work.id, duration_s)
            self._await_end(wire)

    def _wire(self, resource: Resource, shared: bool) -> _Wire:
        wire = self._wires.get(resource)
        if wire is None:
            named = resource[0] < 0
            require(named, "link: expected a name that begins below 0", resource)
            link = SharedLink() if shared else FifoLink()
            wire = self._wires[resource] = _Wire(resource, link)
        return wire

    def _await_part(self, moving: _Moving) -> None:
        """Let the next part of a transfer come to its link when it is computed."""
        moving.due_s = moving.to_come[0][0]
        heapq.heappush(self._heap, (moving.due_s, _LAST, moving.work, moving))

    def _part_computed(self, moving: _Moving) -> None:
        (computed_s, duration_s), moving.to_come = moving.to_come[0], moving.to_come[1:]
        moving.wire.link.add(computed_s, moving.work, duration_s)
        self._await_end(moving.wire)
        if moving.to_come:
            self._await_part(moving)

    def _await_end(self, wire: _Wire) -> None:
        """Leave one valid entry of a wire in the heap, if anything is on it."""
        first = wire.link.next_end()
        due_s = math.inf if first is None else first[1]
        if first is not None and due_s != wire.due_s:
            moving = self._moving[first[0]]
            heapq.heappush(self._heap, (due_s, moving.order, moving.work, wire))
        wire.due_s = due_s

    def _part_landed(self, wire: _Wire) -> Done | None:
        """End the part that is due on a wire; return a Done if its transfer is over."""
        end_s, wire.due_s = wire.due_s, math.inf
        work, began_s = wire.link.finish(end_s)
        self._await_end(wire)
        moving = self._moving[work]
        if not moving.landed:
            moving.start_s = began_s
        moving.landed += 1
        if moving.landed < len(moving.durations_s):
            return None
        del self._moving[moving.work]
        self.busy_s[wire.resource] += sum(moving.durations_s)
        return Done(moving.work, moving.start_s, end_s, bytes=moving.bytes)

    # -- steps ------------------------------------------------------------------------

    def _pass_stages(self, running: _Running, durations_s: Sequence[float]) -> None:
        """Time later stages: step b starts stage k at max(end(b, k-1), end(b-1, k))."""
        end_s = running.due_s
        stages_s = [(running.resource, running.start_s, end_s)]
        for stage, duration_s in enumerate(durations_s, 1):
            resource = (*running.resource, stage)
            if not 0 <= duration_s < _INFINITE:
                _check_duration(running.work, duration_s)
            start_s = max(end_s, self._busy_until_s.get(resource, 0.0))
            end_s = start_s + duration_s * running.factor
            self._busy_until_s[resource] = end_s
            stages_s.append((resource, start_s, end_s))
        running.stages_s, running.last_stage_s = stages_s, end_s

    def _time(self, running: _Running) -> None:
        """Time the next iterations and put the last of them into the heap."""
        ends_s, factor = running.ends_s, running.factor
        end_s = ends_s[-1] if ends_s else running.start_s
        most = len(ends_s) + max(_AHEAD, len(ends_s))
        for duration_s in running.durations_s:
            if not 0 <= duration_s < _INFINITE:  # a call would be felt here
                _check_duration(running.work, duration_s)
            end_s += duration_s * factor
            ends_s.append(end_s)
            if len(ends_s) == most:
                break
        self._push(running, end_s)

    def _push(self, running: _Running, due_s: float) -> None:
        running.due_s = due_s
        heapq.heappush(self._heap, (due_s, running.resource, running.work, running))

    def _step_over(self, running: _Running, end_s: float) -> Done | StageFree:
        """Report that a step is done, or has left its first stage."""
        if running.last_stage_s is None:
            return self._done(running, end_s)
        self._push(running, running.last_stage_s)
        running.last_stage_s = None
        return StageFree(running.work)

    def _done(self, running: _Running, end_s: float) -> Done:
        ends_s: tuple[float, ...] = ()
        if self._spans.pop(running.work, None) is not None:
            self._busy_until_s[running.resource] = end_s
            ends_s = tuple(running.ends_s[running.reported :])
        self._prompts.pop(running.work, None)
        done = Done(
            running.work, running.start_s, end_s, running.outcome.tokens, 0, ends_s
        )
        if running.stages_s:
            for resource, start_s, left_s in running.stages_s:
                self.busy_s[resource] += left_s - start_s
            done.stage_ends_s = tuple([stage[2] for stage in running.stages_s[:-1]])
        else:
            self.busy_s[running.resource] += running.ends_s[-1] - running.start_s
        return done

    def _cut(self, running: _Running, iterations: int) -> None:
        """Keep `iterations` of a span: the reported ones, or one more."""
        del running.ends_s[iterations:]
        running.iterations = iterations
        if running.reported == iterations:
            del self._spans[running.work]
            running.due_s = math.inf
            self._count_told(running)
        elif running.due_s != running.ends_s[-1]:
            self._push(running, running.ends_s[-1])

    def _count_told(self, running: _Running) -> None:
        """Count the work of a span that gets no Done."""
        if running.reported:
            worked_s = running.ends_s[running.reported - 1] - running.start_s
            self.busy_s[running.resource] += worked_s


def _parts_computed_s(step: _Running, parts: int) -> list[float]:
    """Return when each of `parts` equal parts of a step's layers is computed.

    Stages have equally many layers, and the layers of a stage take equally long.
    """
    stages_s = step.stages_s or [(step.resource, step.start_s, step.due_s)]
    computed_s: list[float] = []
    for i in range(1, parts):
        done = i * len(stages_s) / parts
        stage = math.ceil(done) - 1  # a part that ends with one is in that one
        _, start_s, end_s = stages_s[stage]
        computed_s.append(start_s + (done - stage) * (end_s - start_s))
    return [*computed_s, stages_s[-1][2]]


def _check_duration(work: int, duration_s: float) -> None:
    valid = 0 <= duration_s < _INFINITE
    require(valid, f"work {work}: expected a finite duration >= 0", duration_s)
