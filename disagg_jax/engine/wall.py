"""The wall backend: real time, real devices, everything in flight at once."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from disagg_jax.engine.engine import Engine, Result, Running
from disagg_jax.work import Done, Work


@dataclasses.dataclass(eq=False)
class _Pending:
    work: Work
    start_s: float
    running: Running
    arrays: Sequence[Any]  # jax arrays it waits for; their type lacks `is_ready`

    def advance(self) -> Result | None:
        """Goes on as far as arrays are ready; the result once there is no more."""
        while all(array.is_ready() for array in self.arrays):
            try:
                self.arrays = next(self.running)
            except StopIteration as stop:
                return stop.value
        return None


class WallBackend:
    """A `Backend` on the clock of this machine.

    Work is dispatched when submitted and polled for completion, so that no instance
    waits for another. Times are when this thread saw the result on the host.
    """

    def __init__(self, engine: Engine, poll_s: float = 50e-6):
        self._engine = engine
        self._poll_s = poll_s
        self._pending: list[_Pending] = []
        self._zero_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._zero_s

    def submit(self, work: Work) -> None:
        start_s = self.now_s()
        running = self._engine.start(work)
        self._pending.append(_Pending(work, start_s, running, next(running)))

    def wait(self, until_s: float) -> list[Done]:
        while True:
            done = self._completed()
            left_s = until_s - self.now_s()
            if done or left_s <= 0 or (not self._pending and left_s == math.inf):
                return done
            time.sleep(min(self._poll_s, left_s) if self._pending else left_s)

    def drop(self, instance: int) -> None:
        self._pending = [
            pending
            for pending in self._pending
            if instance not in pending.work.instances
        ]

    def _completed(self) -> list[Done]:
        done: list[Done] = []
        for pending in list(self._pending):
            result = pending.advance()
            if result is not None:
                self._pending.remove(pending)
                tokens, size = result
                end_s = self.now_s()
                done.append(Done(pending.work.id, pending.start_s, end_s, tokens, size))
        return done
