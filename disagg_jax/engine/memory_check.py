"""A check that an instance fits in its devices' memory, before it is placed."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from disagg_jax.deployment import InstanceSpec, KVMemory, cut_layers
from models import transformer
from models.config import ModelConfig
from sharding.heads import head_layout
from sharding.mesh import Device
from sharding.rules import Rules

_GIB = 2**30


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
    stages = cut_layers(range(config.layers), spec.pp)
    weights = max(_weight_bytes(config, spec.tp, rules, layers) for layers in stages)
    slots = len(head_layout(config.q_heads, config.kv_heads, spec.tp).kv)
    token_bytes = 2 * slots // spec.tp * config.head_dim * config.dtype_bytes
    block_bytes = len(stages[0]) * memory.block_tokens * token_bytes
    kv = (memory.num_blocks + 1) * block_bytes  # and the scratch block
    if weights + kv > limit_bytes:
        fitting = max(0, (limit_bytes - weights) // block_bytes - 1)
        raise ValueError(
            f"{config.name} on '{spec}': expected at most {limit_bytes / _GIB:.4g} GiB "
            f"on a device, got {weights / _GIB:.4g} of weights and {kv / _GIB:.4g} of "
            f"{memory.num_blocks} KV blocks; {fitting} blocks would fit"
        )


def _weight_bytes(config: ModelConfig, tp: int, rules: Rules, layers: range) -> int:
    """Return the bytes of the weights of `layers` on one of `tp` devices."""

    def leaf_bytes(leaf: jax.ShapeDtypeStruct, axes: tuple[Any, ...]) -> int:
        shards = tp if any(rules[axis] for axis in axes) else 1
        return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // shards

    sizes = jax.tree.map(
        leaf_bytes, transformer.param_shapes(config), transformer.param_axes(config)
    )
    return sum(jax.tree.leaves(transformer.part(sizes, layers)))
