"""Attention of a step on all devices of a stage.

Shape letters as in `models/transformer.py`.
"""

from __future__ import annotations

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from disagg_jax.engine.attention.kernel import AttentionKernel, Inputs
from disagg_jax.engine.attention.kv_cache import Cache, LayerCache
from disagg_jax.programs import StepShape
from models.transformer import Attend


def step_attend(
    shape: StepShape,
    inputs: Inputs,
    kernel: AttentionKernel,
    kv_sharding: NamedSharding,
) -> Attend[Cache]:
    """Return the attention of a step of `shape`: a token sees its request so far.

    Each device writes and attends with its own heads. XLA is not asked to find that out
    (`jax.shard_map`): it would exchange heads where a loop goes over them.

    Args:
      kv_sharding: of the cache, whose second axis is the kv heads.
    """

    def attend_layer(
        inputs: Inputs, layer: LayerCache, *qkv: Array
    ) -> tuple[Array, LayerCache]:
        return kernel.attend(shape, inputs, layer, *qkv)

    kv, heads = kv_sharding.spec, PartitionSpec(None, kv_sharding.spec[1])
    on_each_device = jax.shard_map(
        attend_layer,
        mesh=kv_sharding.mesh,
        in_specs=(PartitionSpec(), kv, heads, heads, heads),
        out_specs=(heads, kv),
        check_vma=False,  # loops begin with zeros, which are equal on all devices
    )

    def attend(
        layer: int, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        out_TNH, written = on_each_device(inputs, cache[layer], q_TNH, k_TKH, v_TKH)
        return out_TNH, [*cache[:layer], written, *cache[layer + 1 :]]

    return attend
