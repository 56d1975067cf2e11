"""Running work alone, to its end: the executor behind the virtual clock."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from disagg_jax.control.backend import Outcome
from disagg_jax.engine.engine import Engine, Result
from disagg_jax.work import Step, Task, Transfer

# (work, seconds that each of its parts took) -> the time it has on the timeline. See
# `Engine.part_keys` for the parts.
DurationRule = Callable[[Task, Sequence[float]], Outcome]


def run_alone(engine: Engine, work: Task) -> tuple[list[float], Result]:
    """Run `work` with nothing beside it; return (seconds of each part, result)."""
    parts_s: list[float] = []
    start_s = time.perf_counter()
    running = engine.start(work)
    while True:
        try:
            pause = next(running)
        except StopIteration as stop:
            # Time after the last part's arrays were ready belongs to that part.
            parts_s[-1] += time.perf_counter() - start_s
            return parts_s, stop.value
        jax.block_until_ready(pause.arrays)
        if pause.ends_part:
            end_s = time.perf_counter()
            parts_s.append(end_s - start_s)
            start_s = end_s


def as_measured(work: Task, parts_s: Sequence[float]) -> Outcome:
    """Return an outcome in which each part takes as long as it took."""
    if isinstance(work, Transfer):
        return Outcome(tuple(parts_s))
    return Outcome((parts_s[0],), later_stages_s=tuple(parts_s[1:]))


def from_table(engine: Engine, step_times: Mapping[str, float]) -> DurationRule:
    """Return a rule that looks up each part by its key."""
    return lambda work, _: as_measured(
        work, [step_times[key] for key in engine.part_keys(work)]
    )


@dataclasses.dataclass
class EngineExecutor:
    """An `Executor` for the virtual clock: the programs run, one at a time.

    `duration` says what stands on the timeline: the time just measured, a median taken
    before, or a model's.

    On one machine a prompt of one instance throws the weights and the KV of another out
    of the caches: on a pinned core the next decode step of m32 then took 26 % longer
    with one row, 9 % with 8 and 5 % with 16. On devices of its own it would not. So
    where the time just measured counts, `warm_up` runs such a step once before it is
    timed.
    """

    engine: Engine
    duration: DurationRule
    warm_up: bool = False
    _last: Step | None = dataclasses.field(default=None, init=False)

    def run(self, work: Task) -> Outcome:
        if isinstance(work, Step):
            if self.warm_up and self._is_cold(work):
                self.engine.warm_up(work)
            self._last = work
        parts_s, (tokens, size) = run_alone(self.engine, work)
        timed = self.duration(work, parts_s)
        return dataclasses.replace(timed, tokens=tokens, bytes=size)

    def _is_cold(self, step: Step) -> bool:
        """Return whether `step` decodes right after another instance's prompts."""
        last = self._last
        if last is None or last.instance == step.instance:
            return False
        return bool(last.load.chunks) and not step.load.chunks


@dataclasses.dataclass(frozen=True)
class TimingExecutor:
    """An `Executor` that runs nothing.

    Its timelines equal the engine's if no token ends a request.
    """

    engine: Engine
    duration: DurationRule  # given () for the times of the parts

    def run(self, work: Task) -> Outcome:
        size = self.engine.transfer_bytes(work) if isinstance(work, Transfer) else 0
        return dataclasses.replace(self.duration(work, ()), bytes=size)
