"""The virtual clock: an event heap that orders work without waiting for it."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from disagg_jax.backend import Executor, Outcome
from disagg_jax.deployment import Deployment
from disagg_jax.sim.shared_link import SharedLink
from disagg_jax.work import (
    Cut,
    Done,
    Report,
    StageFree,
    Step,
    Work,
)

# Iterations of a span that are timed at first, and then as many as there are already:
# most spans are cut early.
_AHEAD: Final = 8
_INFINITE: Final = math.inf

# (instance,), (instance, stage) for its later stages, or a link: its name, by default
# (-3, src, dst). Names of links begin below 0, so that they are no stages.
Resource = tuple[int, ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Running:
    """Work on its way, timed as far as it was needed."""

    work: int
    instances: tuple[int, ...]
    resource: Resource
    start_s: float
    outcome: Outcome
    durations_s: Iterator[float]  # of the iterations that are not timed yet
    iterations: int
    factor: float  # on its durations
    ends_s: list[float] = dataclasses.field(default_factory=list[float])
    reported: int = 0  # iterations
    due_s: float = math.inf  # of its entry in the heap that counts
    last_stage_s: float | None = (
        None  # when the last stage will be done, if it is later
    )
    # Of a step on several stages: when it is on each.
    stages_s: tuple[tuple[float, float], ...] = ()
    # Of a transfer that goes along with a step: when each part that has not been sent
    # will be computed, and how long its link waited for parts.
    parts_s: tuple[float, ...] = ()
    waited_s: float = 0.0


def busy_shares(
    deployment: Deployment, busy_s: Mapping[Resource, float], end_s: float
) -> list[tuple[float, ...]]:
    """For each instance, the share of the time until `end_s` its stages worked.

    What is left is waiting: for requests, and in pipeline bubbles.
    """

    def share(instance: int, stage: int) -> float:
        resource = (instance, stage) if stage else (instance,)
        return busy_s.get(resource, 0.0) / end_s if end_s else 0.0

    return [
        tuple(share(i, stage) for stage in range(spec.pp))
        for i, spec in enumerate(deployment.instances)
    ]


class VirtualBackend:
    """A `Backend` whose time is computed.

    Each instance, and each link from one instance to another, does one thing at a time
    in order of submission, but for links that are shared; a duration is what the
    executor says. With a cost model this is a discrete-event simulator. With an engine
    it is an execution-driven emulator: each program really runs, alone, its tokens are
    real, and it stands on the timeline of its own devices, so that one machine can
    measure a deployment of many. That holds for programs whose devices are really there
    one at a time, not for tensor parallelism over host devices that share the cores.

    A pipelined instance has several steps in flight, one on each stage. What ends at
    one instant is told in a fixed order: links first, then instances.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._now_s = 0.0
        self._busy_until_s: dict[Resource, float] = {}
        # Seconds that an instance (its first stage), a later stage, or a link worked.
        self.busy_s: collections.defaultdict[Resource, float] = collections.defaultdict(
            float
        )
        self._heap: list[tuple[float, Resource, int, _Running]] = []
        self._spans: dict[int, _Running] = {}
        self._factors: dict[int, float] = {}  # of slow instances
        self._shared: dict[Resource, SharedLink] = {}
        self._sharing: dict[int, _Running] = {}  # the transfers on them
        self._prompts: dict[int, _Running] = {}  # steps in flight with prompts

    def now_s(self) -> float:
        return self._now_s

    def submit(self, work: Work) -> None:
        if isinstance(work, Cut):
            self._cut(self._spans[work.work], work.iterations)
            return
        outcome, instances = self._executor.run(work), work.instances
        if isinstance(work, Step):
            resource, iterations = instances, work.iterations
            factor = self._factors.get(work.instance, 1.0)
        else:
            resource = outcome.link or (-3, *instances)
            iterations, factor = 1, 1.0
        start_s = self._busy_until_s.get(resource, 0.0)
        running = _Running(
            work.id,
            instances,
            resource,
            start_s if start_s > self._now_s else self._now_s,
            outcome,
            iter(outcome.durations_s),
            iterations,
            factor,
        )
        if isinstance(work, Step):
            if work.load.chunks:
                self._prompts[work.id] = running
        elif outcome.shared:
            self._share(running)
            return
        elif work.step:
            self._stream(running, self._prompts[work.step])
            return
        self._time(running)
        if running.iterations > 1:
            self._spans[work.id] = running
            return
        self._busy_until_s[resource] = running.due_s
        if outcome.later_stages_s:
            self._pass_stages(running, outcome.later_stages_s)

    def wait(self, until_s: float) -> list[Report]:
        """Advances to the next instant with completions, or to `until_s`."""
        done: list[Report] = []
        while self._heap and self._heap[0][0] <= until_s:
            end_s, _, _, running = heapq.heappop(self._heap)
            if running.due_s != end_s:
                continue  # cut or dropped
            if running.parts_s:
                self._send_part(running)
                continue
            if len(running.ends_s) < running.iterations:
                self._time(running)
                continue
            self._now_s = until_s = end_s
            if running.resource in self._shared:
                self._unshare(running)
            if running.last_stage_s is not None:
                self._push(running, running.last_stage_s)
                running.last_stage_s = None
                done.append(StageFree(running.work))
            else:
                done.append(self._done(running, end_s))
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
        lost = {r.work: r for _, _, _, r in self._heap if instance in r.instances}
        lost |= {w: r for w, r in self._sharing.items() if instance in r.instances}
        for work, running in lost.items():
            running.due_s = math.inf
            if self._spans.pop(work, None) is not None:
                self._count_told(running)
            self._prompts.pop(work, None)
            if work in self._sharing:
                self._unshare(running)
        for resource in self._busy_until_s:
            if instance in resource:
                self._busy_until_s[resource] = self._now_s

    def _share(self, running: _Running) -> None:
        """Puts a transfer on a link beside those that are on it."""
        (alone_s,) = running.durations_s
        running.start_s, running.ends_s = self._now_s, [self._now_s + alone_s]
        self._sharing[running.work] = running
        link = self._shared.setdefault(running.resource, SharedLink())
        link.add(self._now_s, running.work, alone_s)
        self._await_first(link)

    def _unshare(self, running: _Running) -> None:
        del self._sharing[running.work]
        link = self._shared[running.resource]
        link.remove(self._now_s, running.work)
        self._await_first(link)

    def _await_first(self, link: SharedLink) -> None:
        """Leaves one entry of a link in the heap that counts: the next to end."""
        for work in link.left_s:
            self._sharing[work].due_s = math.inf
        if (first := link.next_end()) is not None:
            self._push(self._sharing[first[0]], first[1])

    def _stream(self, running: _Running, computed: _Running) -> None:
        """A transfer in parts, each of which can go when its layers are computed.

        Each stage has equally many layers, which take equally long there. The link
        serves parts as they come.
        """
        durations_s = list(running.outcome.durations_s)
        stages_s = computed.stages_s or ((computed.start_s, computed.due_s),)
        parts_s: list[float] = []
        for i in range(1, len(durations_s)):
            done = i * len(stages_s) / len(durations_s)
            stage = math.ceil(done) - 1  # a part that ends with one is in that one
            start_s, end_s = stages_s[stage]
            parts_s.append(start_s + (done - stage) * (end_s - start_s))
        parts_s.append(stages_s[-1][1])
        running.parts_s = tuple(parts_s)
        running.durations_s = iter(durations_s)
        self._push_stream(running, parts_s[0])

    def _send_part(self, running: _Running) -> None:
        """The next part is computed: the link takes it when it is free."""
        computed_s, running.parts_s = running.parts_s[0], running.parts_s[1:]
        free_s = max(computed_s, self._busy_until_s.get(running.resource, 0.0))
        end_s = free_s + next(running.durations_s)
        if running.ends_s:
            running.waited_s += free_s - running.ends_s[-1]
        else:
            running.start_s = free_s
        running.ends_s = [end_s]
        self._busy_until_s[running.resource] = end_s
        self._push_stream(running, running.parts_s[0] if running.parts_s else end_s)

    def _push_stream(self, running: _Running, due_s: float) -> None:
        """Behind all else of an instant: the KV lands after it was computed."""
        running.due_s = due_s
        last = (sys.maxsize, *running.resource)
        heapq.heappush(self._heap, (due_s, last, running.work, running))

    def _pass_stages(self, running: _Running, durations_s: Sequence[float]) -> None:
        """Later stages: start(b, k) = max(end(b, k - 1), end(b - 1, k)) of steps b."""
        end_s = running.due_s
        stages_s = [(running.start_s, end_s)]
        for stage, duration_s in enumerate(durations_s, 1):
            resource = (*running.resource, stage)
            start_s = max(end_s, self._busy_until_s.get(resource, 0.0))
            end_s = start_s + duration_s * running.factor
            self._busy_until_s[resource] = end_s
            self.busy_s[resource] += end_s - start_s
            stages_s.append((start_s, end_s))
        running.stages_s, running.last_stage_s = tuple(stages_s), end_s

    def _time(self, running: _Running) -> None:
        """Times the next iterations and puts the last of them into the heap."""
        ends_s, factor = running.ends_s, running.factor
        end_s = ends_s[-1] if ends_s else running.start_s
        most = len(ends_s) + max(_AHEAD, len(ends_s))
        for duration_s in running.durations_s:
            if not 0 <= duration_s < _INFINITE:
                raise ValueError(
                    f"work {running.work}: expected a finite duration >= 0, "
                    f"got {duration_s}"
                )
            end_s += duration_s * factor
            ends_s.append(end_s)
            if len(ends_s) == most:
                break
        self._push(running, end_s)

    def _push(self, running: _Running, due_s: float) -> None:
        running.due_s = due_s
        heapq.heappush(self._heap, (due_s, running.resource, running.work, running))

    def _done(self, running: _Running, end_s: float) -> Done:
        worked_s = running.ends_s[-1] - running.start_s - running.waited_s
        self.busy_s[running.resource] += worked_s
        ends_s: tuple[float, ...] = ()
        if self._spans.pop(running.work, None) is not None:
            self._busy_until_s[running.resource] = end_s
            ends_s = tuple(running.ends_s[running.reported :])
        self._prompts.pop(running.work, None)
        tokens, size = running.outcome.tokens, running.outcome.bytes
        done = Done(running.work, running.start_s, end_s, tokens, size, ends_s)
        if running.stages_s:
            done.stage_ends_s = tuple([left_s for _, left_s in running.stages_s[:-1]])
        return done

    def _cut(self, running: _Running, iterations: int) -> None:
        """Leaves `iterations` of a span: those that were told, or one more."""
        del running.ends_s[iterations:]
        running.iterations = iterations
        if running.reported == iterations:
            del self._spans[running.work]
            running.due_s = math.inf
            self._count_told(running)
        elif running.due_s != running.ends_s[-1]:
            self._push(running, running.ends_s[-1])

    def _count_told(self, running: _Running) -> None:
        """Counts the work of a span of which no Done follows."""
        if running.reported:
            worked_s = running.ends_s[running.reported - 1] - running.start_s
            self.busy_s[running.resource] += worked_s
