"""The wall backend: real time, real devices, everything in flight at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import queue
import time
from collections.abc import Sequence

import jax

from disagg_jax.engine.engine import Engine, Pause, Running
from disagg_jax.work import Done, Report, StageFree, Step, Task, TruncateSpan, Work


@dataclasses.dataclass(eq=False)
class _Pending:
    work: Task
    start_s: float
    running: Running
    pause: Pause | None = None  # the one it is in
    parts_s: list[float] = dataclasses.field(default_factory=list)  # ends, as learnt
    dropped: bool = False


class WallBackend:
    """A `Backend` on the clock of this machine.

    Work is dispatched when submitted, so that no instance waits for another. Threads
    wait for the arrays of work in flight: polling took CPU time from host devices. All
    else happens in the calling thread. A time is when that thread learnt of a result.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._pending: set[_Pending] = set()
        # (work whose arrays are ready, or the error that they raised)
        self._ready: queue.SimpleQueue[tuple[_Pending, BaseException | None]] = (
            queue.SimpleQueue()
        )
        self._waiters = concurrent.futures.ThreadPoolExecutor(
            max_workers=256, thread_name_prefix="wait-for-arrays"
        )
        self._zero_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._zero_s

    def submit(self, work: Work) -> None:
        if isinstance(work, TruncateSpan):
            raise ValueError("spans need a backend that simulates")
        pending = _Pending(work, self.now_s(), self._engine.start(work))
        self._pending.add(pending)
        self._advance(pending)

    def wait(self, until_s: float) -> list[Report]:
        done: list[Report] = []
        while not done:
            left_s = until_s - self.now_s()
            if left_s == math.inf and not self._pending:
                break
            try:
                timeout_s = None if left_s == math.inf else max(0.0, left_s)
                pending, error = self._ready.get(timeout=timeout_s)
            except queue.Empty:
                break
            if pending.dropped:
                continue
            if error is not None:
                raise error
            done += self._advance(pending)
        return done

    def progress(self, work: int) -> Sequence[float]:
        return ()  # this backend takes no spans

    def slow(self, instance: int, factor: float) -> None:
        raise ValueError("stragglers need a backend that simulates")

    def drop(self, instance: int) -> None:
        lost = {p for p in self._pending if instance in p.work.instances}
        for pending in lost:
            pending.dropped = True
        self._pending -= lost

    def _advance(self, pending: _Pending) -> list[Report]:
        """Go on with work whose arrays are ready; return what there is to report."""
        was_in, work = pending.pause, pending.work
        try:
            pending.pause = next(pending.running)
        except StopIteration as stop:
            self._pending.remove(pending)
            tokens, size = stop.value
            done = Done(work.id, pending.start_s, self.now_s(), tokens, size)
            if isinstance(work, Step):
                done.stage_ends_s = tuple(pending.parts_s)
            return [done]
        self._waiters.submit(self._await, pending, pending.pause)
        if was_in is None or not was_in.ends_part:
            return []
        pending.parts_s.append(self.now_s())
        left_first = isinstance(work, Step) and len(pending.parts_s) == 1
        return [StageFree(work.id)] if left_first else []

    def _await(self, pending: _Pending, pause: Pause) -> None:
        try:
            jax.block_until_ready(pause.arrays)
        except BaseException as error:  # the caller's thread gets every error
            self._ready.put((pending, error))
        else:
            self._ready.put((pending, None))
