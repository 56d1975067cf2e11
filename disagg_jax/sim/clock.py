"""The virtual clock: work is run alone, and its duration placed on a timeline.

With a cost model behind it this is a discrete-event simulator. With a real engine
behind it, it is execution-driven emulation: the programs run and their tokens are real,
and each duration stands on the timeline of the instance's *own* devices, so that one
machine can measure a deployment of many. That holds for programs whose devices are
really there one at a time, not for tensor parallelism over host devices that share the
cores.
"""

from __future__ import annotations

import heapq
import math

from disagg_jax.backend import Executor
from disagg_jax.work import Done, Work


class VirtualBackend:
    """A `Backend` on virtual time. An instance, or a link, does one thing at a time.

    A link joins one source to one destination instance and serves transfers in order.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._now_s = 0.0
        self._busy_until_s: dict[tuple[int, ...], float] = {}  # instance or link
        self._heap: list[tuple[float, int, tuple[int, ...], Done]] = []

    def now_s(self) -> float:
        return self._now_s

    def submit(self, work: Work) -> None:
        resource = work.instances  # one instance, or the link between two
        outcome = self._executor.run(work)
        if not 0 <= outcome.duration_s < math.inf:
            raise ValueError(
                f"work {work.id}: expected a finite duration >= 0, "
                f"got {outcome.duration_s}"
            )
        start_s = max(self._now_s, self._busy_until_s.get(resource, 0.0))
        end_s = start_s + outcome.duration_s
        self._busy_until_s[resource] = end_s
        done = Done(work.id, start_s, end_s, outcome.tokens, outcome.bytes)
        heapq.heappush(self._heap, (end_s, work.id, resource, done))

    def wait(self, until_s: float) -> list[Done]:
        """Advances to the next instant with completions, or to `until_s`."""
        next_s = self._heap[0][0] if self._heap else math.inf
        if next_s > until_s or next_s == math.inf:
            if until_s < math.inf:
                self._now_s = max(self._now_s, until_s)
            return []
        self._now_s = next_s
        done: list[Done] = []
        while self._heap and self._heap[0][0] == next_s:
            done.append(heapq.heappop(self._heap)[3])
        return done

    def drop(self, instance: int) -> None:
        self._heap = [item for item in self._heap if instance not in item[2]]
        heapq.heapify(self._heap)
        for resource in self._busy_until_s:
            if instance in resource:
                self._busy_until_s[resource] = self._now_s
