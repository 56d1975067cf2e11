"""The memory of an instance's devices: whether it fits, and how large a pool may be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from disagg_jax.deployment import InstanceSpec, KVMemory, cut_layers
from disagg_jax.errors import require
from models import transformer
from models.config import ModelConfig
from sharding.heads import head_layout
from sharding.mesh import Device
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
    config: ModelConfig,
    spec: InstanceSpec,
    memory: KVMemory,
    rules: Rules,
    limit_bytes: int | None,
) -> None:
    """Check the weights and the KV pool of the fullest device of an instance.

    The memory of a step itself comes on top; it is not known before compilation.

    Raises:
      ValueError: with the sizes, and how many KV blocks would fit.
    """
    if limit_bytes is None:
        return
    weights, block_bytes = _fullest_device(config, spec, memory.block_tokens, rules)
    kv = (memory.num_blocks + 1) * block_bytes  # and the scratch block
    if weights + kv > limit_bytes:
        fitting = max(0, (limit_bytes - weights) // block_bytes - 1)
        raise ValueError(
            f"{config.name} on '{spec}': expected at most {limit_bytes / _GIB:.4g} GiB "
            f"on a device, got {weights / _GIB:.4g} of weights and {kv / _GIB:.4g} of "
            f"{memory.num_blocks} KV blocks; {fitting} blocks would fit"
        )


def default_memory(
    config: ModelConfig,
    spec: InstanceSpec,
    rules: Rules,
    limit_bytes: int | None,
    max_context: int | None = None,
) -> KVMemory:
    """Return a KV pool for an instance: `_LONGEST_AT_ONCE` requests of `max_context`.

    It is smaller where a device has less room: `_POOL_SHARE` of what the weights leave
    free, or `_HOST_POOL_BYTES` where the device does not say what it has.

    Args:
      max_context: by default the model's, or what the pool has room for.

    Raises:
      ValueError: if the pool has no room for a request of `max_context`.
    """
    memory = KVMemory(num_blocks=1, max_context=max_context or config.max_length)
    weights, block_bytes = _fullest_device(config, spec, memory.block_tokens, rules)
    room_bytes = _HOST_POOL_BYTES
    if limit_bytes is not None:
        room_bytes = int(_POOL_SHARE * (limit_bytes - weights))
    # Beside the scratch block. `check_fits` says so if there is no room for one.
    most = max(1, room_bytes // block_bytes - 1)
    held = most * memory.block_tokens
    expected = f"max_context: expected at most {held}, what a KV pool of "
    expected += f"{room_bytes / _GIB:.4g} GiB on a device of '{spec}' has room for"
    require(held >= (max_context or 1), expected, memory.max_context)
    longest = min(memory.max_context, held)
    blocks = min(most, _LONGEST_AT_ONCE * memory.blocks_for(longest))
    return dataclasses.replace(memory, num_blocks=blocks, max_context=longest)


def _fullest_device(
    config: ModelConfig, spec: InstanceSpec, block_tokens: int, rules: Rules
) -> tuple[int, int]:
    """Return the bytes of weights and of a KV block on the device with the most."""
    stages = cut_layers(range(config.layers), spec.parallelism.pp)
    weights = max(
        _weight_bytes(config, spec.parallelism.tp, rules, layers) for layers in stages
    )
    slots = len(head_layout(config.q_heads, config.kv_heads, spec.parallelism.tp).kv)
    token_bytes = (
        2 * slots // spec.parallelism.tp * config.head_dim * config.dtype_bytes
    )
    return weights, len(stages[0]) * block_tokens * token_bytes


def _weight_bytes(config: ModelConfig, tp: int, rules: Rules, layers: range) -> int:
    """Return the bytes of the weights of `layers` on one of `tp` devices."""

    def leaf_bytes(leaf: jax.ShapeDtypeStruct, axes: tuple[Any, ...]) -> int:
        shards = tp if any(rules[axis] for axis in axes) else 1
        return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // shards

    sizes = jax.tree.map(
        leaf_bytes, transformer.param_shapes(config), transformer.param_axes(config)
    )
    return sum(jax.tree.leaves(transformer.part(sizes, layers)))
