"""Work that needs each program of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from disagg_jax.deployment import Role
from disagg_jax.engine.engine import Engine
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
            slices = typical_slices(shape, instance.buckets, instance.programs.memory)
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
