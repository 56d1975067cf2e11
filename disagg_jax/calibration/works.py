"""Work that needs each program of an engine, and the table of what each takes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from disagg_jax.deployment import Role
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import run_alone
from disagg_jax.programs.slices import typical_slices
from disagg_jax.request import Request
from disagg_jax.work import Step, Task, Transfer


def every_work(engine: Engine, *, streams: bool = False) -> Iterator[Task]:
    """Yield work that needs each program, and each size of a transfer.

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
                if streams:  # the step is over: its KV is all there
                    yield dataclasses.replace(whole, step=1)


def check_step_times(
    engine: Engine, step_times: Mapping[str, float], *, streams: bool = False
) -> None:
    """Raise ValueError if the table lacks a program that the deployment can need."""
    works = every_work(engine, streams=streams)
    needed = {key for work in works for key in engine.part_keys(work)}
    if missing := sorted(needed - step_times.keys()):
        raise ValueError(
            f"step times: expected entries for all {len(needed)} programs of "
            f"{engine.deployment}, but {len(missing)} are missing, such as "
            f"'{missing[0]}'; the table was taken for other buckets or deployments"
        )


def measure_step_times(
    engines: Sequence[Engine],
    repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
    *,
    streams: bool = False,
) -> dict[str, float]:
    """Return the median seconds of every program of the deployments, run alone.

    The rounds go over all programs in turn, so that a slow moment of the machine falls
    on different programs in different rounds, and on no system more than on another.
    Each round has an order of its own, and a step runs once before it is timed: the
    work before leaves the caches full of its own data. In the order of the list the
    first decode steps came after the longest prompt and took 1.4 to 2.2 times as long
    as the decode steps after them (smoke on a CPU: 0.87 ms with one row, 0.57 with two;
    in turn 0.43 and 0.40). A transfer always follows other work, so it runs once. The
    pools hold garbage afterwards.

    Args:
      streams: whether KV leaves in parts while its prompt is computed.
    """
    works = {
        tuple(engine.part_keys(work)): (engine, work)
        for engine in engines
        for work in every_work(engine, streams=streams)
    }
    for engine, work in works.values():
        run_alone(engine, work)
    times: dict[str, list[float]] = {key: [] for keys in works for key in keys}
    listed = list(works.items())
    for i in range(repeats):
        progress(f"timing {len(works)} programs, round {i + 1} of {repeats}")
        for at in np.random.default_rng(i).permutation(len(listed)).tolist():
            keys, (engine, work) = listed[at]
            if isinstance(work, Step):
                run_alone(engine, work)
            for key, part_s in zip(keys, run_alone(engine, work)[0], strict=True):
                times[key].append(part_s)
    return {key: statistics.median(values) for key, values in times.items()}
