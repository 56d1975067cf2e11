"""Running work alone, to its end: the executor behind the virtual clock, and timing."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from disagg_jax.backend import Outcome
from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.engine.engine import Engine, Result
from disagg_jax.request import Request
from disagg_jax.work import Slice, Step, StepLoad, Task, Transfer


def run_alone(engine: Engine, work: Task) -> tuple[float, Result]:
    """Runs `work` to its end with nothing beside it: (seconds, result)."""
    start_s = time.perf_counter()
    running = engine.start(work)
    while True:
        try:
            arrays = next(running)
        except StopIteration as stop:
            return time.perf_counter() - start_s, stop.value
        jax.block_until_ready(arrays)


@dataclasses.dataclass(frozen=True)
class EngineExecutor:
    """An `Executor` for the virtual clock: the programs run, one at a time.

    `duration_s(work, measured_s)` says what stands on the timeline: the time just
    measured, a median taken before, or a model's.
    """

    engine: Engine
    duration_s: Callable[[Task, float], float]

    def run(self, work: Task) -> Outcome:
        measured_s, (tokens, size) = run_alone(self.engine, work)
        return Outcome((self.duration_s(work, measured_s),), tokens, size)


@dataclasses.dataclass(frozen=True)
class TimingExecutor:
    """An `Executor` that runs nothing: equal timelines, if no token ends a request."""

    engine: Engine
    duration_s: Callable[[Task], float]

    def run(self, work: Task) -> Outcome:
        size = self.engine.transfer_bytes(work) if isinstance(work, Transfer) else 0
        return Outcome((self.duration_s(work),), bytes=size)


def table_duration(
    engine: Engine, step_times: Mapping[str, float]
) -> Callable[[Task, float], float]:
    """A `duration_s` that looks each program up; see `check_step_times`."""
    return lambda work, measured_s: step_times[engine.program_key(work)]


def check_step_times(engine: Engine, step_times: Mapping[str, float]) -> None:
    """Raises ValueError if the table lacks a program that the deployment can need."""
    needed = {engine.program_key(work) for work in _every_work(engine)}
    if missing := sorted(needed - step_times.keys()):
        raise ValueError(
            f"step times: expected entries for all {len(needed)} programs of "
            f"{engine.deployment}, but {len(missing)} are missing, such as "
            f"'{missing[0]}'; the table was taken for other buckets or deployments"
        )


def measure_step_times(
    engine: Engine, repeats: int = 5, progress: Callable[[str], None] = lambda _: None
) -> dict[str, float]:
    """Median seconds of every program the deployment can need, each run alone.

    The rounds go over all programs in turn, so that a slow moment of the machine falls
    on different programs in different rounds. The pools hold garbage afterwards.
    """
    works = {engine.program_key(work): work for work in _every_work(engine)}
    for work in works.values():
        run_alone(engine, work)
    times: dict[str, list[float]] = {key: [] for key in works}
    for i in range(repeats):
        progress(f"timing {len(works)} programs, round {i + 1} of {repeats}")
        for key, work in works.items():
            times[key].append(run_alone(engine, work)[0])
    return {key: statistics.median(values) for key, values in times.items()}


def _every_work(engine: Engine) -> Iterable[Task]:
    for i, instance in enumerate(engine.instances):
        for shape in instance.buckets.step_shapes:
            yield Step.of(0, i, full_slices(shape, instance.model.memory))
    for src in engine.deployment.of(Role.PREFILL):
        for dst in engine.deployment.of(Role.DECODE):
            for size in engine.instances[src].buckets.transfer_blocks:
                blocks = tuple(range(size))
                request = Request(id=0, arrival_s=0, prompt_tokens=1, max_tokens=1)
                yield Transfer(0, request, src, dst, blocks, blocks, 1)


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
    """Slices of a step with this load, their blocks one after the other in the pool.

    Where the pool is too short they share its last blocks: it is for timing.
    """
    parts = list(load.chunks)
    if load.decodes:
        parts += [(max(1, load.context // load.decodes - 1), 1)] * load.decodes
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
