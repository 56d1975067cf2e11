"""The memory of an instance's devices: whether it fits, and how large a pool may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from disagg_jax.deployment import InstanceSpec, KVMemory
from disagg_jax.engine.attention.registry import AUTO, choose_kernel
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.place_weights import join_groups
from disagg_jax.engine.stage import Stage
from disagg_jax.errors import require
from models.config import ModelConfig
from sharding.mesh import Device, cut_meshes
from sharding.rules import Rules

_GIB = 2**30
# Of a default pool. A usual request is much shorter than the longest one, so these many
# blocks hold hundreds of requests. Steps need memory too, beside weights and pool.
_LONGEST_AT_ONCE = 16
_POOL_SHARE = 0.8
_HOST_POOL_BYTES = 2**29


def memory_bytes(device: Device) -> int | None:
    """Return the bytes the device's allocator may hand out; None if it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


def check_fits(
    spec: InstanceSpec, programs: ModelPrograms, limit_bytes: int | None
) -> None:
    """Check that an instance fits in the memory of its devices, at every stage.

    A device holds weights, a KV pool, the code of programs, and the temporary arrays
    and results of the program that runs. Only programs that are compiled already count:
    none is compiled to find out.

    Raises:
      ValueError: with the sizes, and how many KV blocks would fit.
    """
    if limit_bytes is None:
        return
    blocks = programs.memory.num_blocks
    stages = [_stage_bytes(programs, stage) for stage in programs.stages]
    fullest = min(stages, key=lambda stage: stage.blocks_within(limit_bytes))
    fitting = fullest.blocks_within(limit_bytes)
    if blocks > fitting:
        kv = (blocks + 1) * fullest.block
        raise ValueError(
            f"{programs.config.name} on '{spec}': expected at most "
            f"{limit_bytes / _GIB:.4g} GiB on a device, got "
            f"{fullest.weights / _GIB:.4g} of weights, {kv / _GIB:.4g} of {blocks} KV "
            f"blocks, {fullest.step / _GIB:.4g} of the largest compiled program's "
            f"temporary arrays and results, and {fullest.code / _GIB:.4g} of code; "
            f"{max(0, fitting)} blocks would fit"
        )


def default_memory(
    config: ModelConfig,
    spec: InstanceSpec,
    rules: Rules,
    devices: Sequence[Device],
    limit_bytes: int | None,
    max_context: int | None = None,
    block_tokens: int | None = None,
    attention: str = AUTO,
) -> KVMemory:
    """Return a KV pool for an instance: `_LONGEST_AT_ONCE` requests of `max_context`.

    It is smaller where a device has less room; see `held_blocks`.

    Args:
      devices: as many as the instance has, or more; each of `limit_bytes`.
      max_context: by default the model's, or what the pool has room for.
      block_tokens: by default those that suit the attention kernel.
      attention: the kernel; see `choose_kernel`.

    Raises:
      ValueError: if the pool has no room for a request of `max_context`, or for what
        `ModelPrograms` raises it.
    """
    chosen = choose_kernel(attention, devices[0], config, block_tokens)
    memory = KVMemory(
        num_blocks=1,
        block_tokens=block_tokens or chosen.kernel.block_tokens,
        max_context=max_context or config.max_length,
    )
    meshes = cut_meshes(devices, [spec.parallelism.tp] * spec.parallelism.pp)
    programs = ModelPrograms(config, meshes, rules, memory, chosen.kernel)
    most = held_blocks(programs, limit_bytes)
    held = most * memory.block_tokens
    expected = f"max_context: expected at most {held}, what the default KV pool of "
    expected += f"'{spec}' has room for"
    require(held >= (max_context or 1), expected, memory.max_context)
    longest = min(memory.max_context, held)
    blocks = min(most, _LONGEST_AT_ONCE * memory.blocks_for(longest))
    return dataclasses.replace(memory, num_blocks=blocks, max_context=longest)


def held_blocks(programs: ModelPrograms, limit_bytes: int | None) -> int:
    """Return the KV blocks that the fullest device of an instance holds by default.

    They take `_POOL_SHARE` of what the weights leave free, or `_HOST_POOL_BYTES` where
    the device does not say what it has; one of them is the scratch block. At least one
    is held beside it: `check_fits`, or the compiler, says so if there is no room.
    """

    def on_stage(stage: Stage) -> int:
        held = _stage_bytes(programs, stage)
        room_bytes = _HOST_POOL_BYTES
        if limit_bytes is not None:
            room_bytes = int(_POOL_SHARE * (limit_bytes - held.weights))
        return max(1, room_bytes // held.block - 1)

    return min(map(on_stage, programs.stages))


class _StageBytes(NamedTuple):
    """Bytes on one device of a stage."""

    weights: int
    block: int  # a KV block, in all layers of the stage
    step: int  # most that a compiled program needs to run, beside what it is given
    code: int  # of all compiled programs, which stay on the device

    def blocks_within(self, limit_bytes: int) -> int:
        """Return the KV blocks there is room for, beside the scratch block."""
        used = self.weights + self.step + self.code
        return (limit_bytes - used) // self.block - 1


def _stage_bytes(programs: ModelPrograms, stage: Stage) -> _StageBytes:
    groups = [group for group in programs.groups if group.stage is stage]
    weights = join_groups([group.specs for group in groups])
    part = stage.cache_spec(1)[0][0]
    tables = [stage.programs, *(group.programs for group in groups)]
    analyses = [each.memory_analysis() for table in tables for each in table]
    known = [each for each in analyses if each is not None]  # XLA may not say
    return _StageBytes(
        weights=sum(map(_device_bytes, jax.tree.leaves(weights))),
        block=2 * len(stage.layers) * _device_bytes(part) // part.shape[0],
        step=max(map(_step_bytes, known), default=0),
        code=sum(each.generated_code_size_in_bytes for each in known),
    )


def _device_bytes(spec: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of an array on each of its devices."""
    return math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize


def _step_bytes(memory: Any) -> int:
    """Return the bytes of temporary arrays, and of results but for donated arrays."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results
