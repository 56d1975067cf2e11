"""Running work alone, to its end: the executor behind the virtual clock."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from disagg_jax.control.backend import Outcome
from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.engine import Engine, Result
from disagg_jax.request import Request
from disagg_jax.work import Slice, Step, StepLoad, Task, Transfer

# The time on the timeline of work whose parts took so many seconds; see `Engine`.
Timing = Callable[[Task, Sequence[float]], Outcome]


def run_alone(engine: Engine, work: Task) -> tuple[list[float], Result]:
    """Runs `work` to its end with nothing beside it: (seconds of each part, result)."""
    parts_s: list[float] = []
    start_s = time.perf_counter()
    running = engine.start(work)
    while True:
        try:
            pause = next(running)
        except StopIteration as stop:
            # What came after the last part's arrays was there belongs to it.
            parts_s[-1] += time.perf_counter() - start_s
            return parts_s, stop.value
        jax.block_until_ready(pause.arrays)
        if pause.ends_part:
            end_s = time.perf_counter()
            parts_s.append(end_s - start_s)
            start_s = end_s


def outcome(work: Task, parts_s: Sequence[float]) -> Outcome:
    """The `Timing` by which each part takes as long as it took."""
    if isinstance(work, Transfer):
        return Outcome(tuple(parts_s))
    return Outcome((parts_s[0],), later_stages_s=tuple(parts_s[1:]))


@dataclasses.dataclass
class EngineExecutor:
    """An `Executor` for the virtual clock: the programs run, one at a time.

    `timing` says what stands on the timeline: the time just measured, a median taken
    before, or a model's.

    On one machine a prompt of one instance throws the weights and the KV of another out
    of the caches: on a pinned core the next decode step of m32 then took 26 % longer
    with one row, 9 with 8 and 5 with 16. On devices of its own it would not. So where
    the time just measured counts, such a step is to run once before it is timed.
    """

    engine: Engine
    timing: Timing
    warm_up: bool = False  # whether such a step does
    _last: Step | None = dataclasses.field(default=None, init=False)

    def run(self, work: Task) -> Outcome:
        if isinstance(work, Step):
            if self.warm_up and self._is_cold(work):
                self.engine.warm_up(work)
            self._last = work
        parts_s, (tokens, size) = run_alone(self.engine, work)
        timed = self.timing(work, parts_s)
        return dataclasses.replace(timed, tokens=tokens, bytes=size)

    def _is_cold(self, step: Step) -> bool:
        last = self._last
        if last is None or last.instance == step.instance:
            return False
        return bool(last.load.chunks) and not step.load.chunks


@dataclasses.dataclass(frozen=True)
class TimingExecutor:
    """An `Executor` that runs nothing: equal timelines, if no token ends a request."""

    engine: Engine
    timing: Timing  # whatever it is given for the times of the parts

    def run(self, work: Task) -> Outcome:
        size = self.engine.transfer_bytes(work) if isinstance(work, Transfer) else 0
        return dataclasses.replace(self.timing(work, ()), bytes=size)


def table_timing(engine: Engine, step_times: Mapping[str, float]) -> Timing:
    """A `Timing` that looks each part up by its key."""
    return lambda work, _: outcome(
        work, [step_times[key] for key in engine.part_keys(work)]
    )


def every_work(engine: Engine, *, streams: bool = False) -> Iterator[Task]:
    """Work that needs each program, and each size of a transfer, of a deployment.

    Args:
      streams: whether KV leaves in parts while its prompt is computed.
    """
    for i, instance in enumerate(engine.instances):
        for shape in instance.buckets.step_shapes:
            slices = typical_slices(shape, instance.buckets, instance.model.memory)
            yield Step.of(0, i, slices)
    for src in engine.deployment.of(Role.PREFILL):
        for dst in engine.deployment.of(Role.DECODE):
            for size in engine.instances[src].buckets.transfer_blocks:
                blocks = tuple(range(size))
                request = Request(id=0, arrival_s=0, prompt_tokens=1, max_tokens=1)
                whole = Transfer(0, request, src, dst, blocks, blocks, 1)
                yield whole
                if streams:  # of a step that is not going on: its KV is all there
                    yield dataclasses.replace(whole, step=1)


def typical_slices(
    shape: StepShape, buckets: Buckets, memory: KVMemory
) -> tuple[Slice, ...]:
    """Slices that need `shape`, but decodes with half of the pool's front in use.

    What is in a decode program changes what it takes: of 16 rows over 256 blocks 6 %
    less (m32; tiny 17 %) on a CPU with 100 blocks in use than with all, perhaps since
    masked scores skip their exponentials. Sizes are steps of 4, so half is the middle.
    """
    if not isinstance(shape, DecodeShape):
        return full_slices(shape, memory)
    smaller = [size for size in buckets.pool_blocks if size < shape.blocks]
    least = max(smaller, default=0) + 1
    blocks = max(least, min(shape.rows, shape.blocks), shape.blocks // 2)
    return _full_decodes(shape.rows, blocks, memory)


def full_slices(shape: StepShape, memory: KVMemory) -> tuple[Slice, ...]:
    """Slices that fill `shape` and need it. Rows may share blocks: it is for timing."""
    if isinstance(shape, DecodeShape):
        return _full_decodes(shape.rows, shape.blocks, memory)
    if isinstance(shape, PrefillShape):
        parts = np.array_split(np.arange(shape.tokens), min(shape.rows, shape.tokens))
        counts = [len(part) for part in parts]
        return tuple(_slice(0, n, range(memory.blocks_for(n))) for n in counts)
    context = shape.context * memory.block_tokens
    count = max(shape.tokens - shape.decodes, min(shape.tokens // 2, context))
    chunk = _slice(context - count, count, range(shape.context))
    return (chunk, *_full_decodes(shape.tokens - count, shape.blocks, memory))


def load_slices(load: StepLoad, memory: KVMemory) -> tuple[Slice, ...]:
    """Slices of a step with this load, its decodes all alike; see `slices_of`."""
    parts = list(load.chunks)
    if load.decodes:
        parts += [(max(1, load.context // load.decodes - 1), 1)] * load.decodes
    return slices_of(parts, memory)


def slices_of(parts: Iterable[tuple[int, int]], memory: KVMemory) -> tuple[Slice, ...]:
    """Slices of these (start, count), their blocks one after the other in the pool.

    Where the pool is too short they share its last blocks: it is for timing.
    """
    slices: list[Slice] = []
    first = 0
    for start, count in parts:
        blocks = memory.blocks_for(start + count)
        first = max(0, min(first, memory.num_blocks - blocks))
        slices.append(_slice(start, count, range(first, first + blocks)))
        first += blocks
    return tuple(slices)


def _full_decodes(rows: int, blocks: int, memory: KVMemory) -> tuple[Slice, ...]:
    """Decodes that have the front of the pool to themselves, all blocks full."""
    tables = np.array_split(np.arange(blocks), rows) if rows else []
    tables = [table if len(table) else np.array([0]) for table in tables]
    return tuple(
        _slice(len(table) * memory.block_tokens - 1, 1, table.tolist())
        for table in tables
    )


def _slice(start: int, count: int, blocks: Iterable[int]) -> Slice:
    return Slice(
        request=Request(id=0, arrival_s=0, prompt_tokens=start + 1, max_tokens=1),
        start=start,
        count=count,
        samples=True,
        blocks=tuple(blocks),
        tokens=(0,) * count,
    )
