"""Attention of a step: KV is written, then each token sees its request so far.

Shape letters as in `models/transformer.py`; also B decode rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from disagg_jax.engine.attention.gathered import gathered_attention, prompt_attention
from disagg_jax.engine.attention.kv_cache import (
    Cache,
    LayerCache,
    write_blocks,
    write_tokens,
)
from disagg_jax.engine.attention.paged import Entries, paged_attention
from disagg_jax.programs import StepShape
from models.transformer import Attend

Inputs = Mapping[str, Array]  # the fields of a packed vector, see `packing.fields_of`


def step_attend(
    shape: StepShape,
    inputs: Inputs,
    block_tokens: int,
    kv_sharding: NamedSharding,
    chunk: int | None,
) -> Attend[Cache]:
    """Return the attention of a step of `shape`: a token sees its request so far.

    Each device writes and attends with its own heads. XLA is not asked to find that out
    (`jax.shard_map`): it would exchange heads where a loop goes over them.

    Args:
      kv_sharding: of the cache, whose second axis is the kv heads.
      chunk: see `paged.chunk_entries`.
    """

    def attend_layer(
        inputs: Inputs, layer: LayerCache, q_TNH: Array, k_TKH: Array, v_TKH: Array
    ) -> tuple[Array, LayerCache]:
        write = _step_write(shape, inputs, block_tokens)
        attention = _step_attention(shape, inputs, block_tokens, chunk)
        k, v = layer
        k, v = write(k, k_TKH), write(v, v_TKH)
        return attention(q_TNH, k_TKH, v_TKH, (k, v)), (k, v)

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


def _step_write(
    shape: StepShape, inputs: Inputs, block_tokens: int
) -> Callable[[Array, Array], Array]:
    """Return (k or v of a layer, the tokens' keys or values) -> written k or v."""

    def write(part: Array, x_TKH: Array) -> Array:
        # Decodes first: XLA for TPUs has another layout for a scatter of tokens to what
        # whole blocks were written to, and copied the pool into it and back.
        if B := shape.decodes:
            part = write_tokens(part, inputs["slot"], x_TKH[:B])
        if shape.kind == "decode":
            return part
        token_WO = inputs["write_token"].reshape(-1, block_tokens)
        keep = shape.kind == "mixed"  # a chunk can begin inside a block
        return write_blocks(part, inputs["write_block"], token_WO, x_TKH, keep=keep)

    return write


def _step_attention(
    shape: StepShape, inputs: Inputs, block_tokens: int, chunk: int | None
) -> Callable[[Array, Array, Array, LayerCache], Array]:
    """Return (queries, their keys, their values, layer's cache) -> outputs."""
    if shape.kind == "prefill":
        return lambda q, k, v, _: prompt_attention(inputs["row"], q, k, v)
    B = shape.decodes
    if not B:  # an instance that never decodes: there are no entries
        gathered = gathered_attention(inputs, block_tokens)
        return lambda q, k, v, layer: gathered(q, layer)
    entries = Entries(inputs["block"], inputs["owner"], inputs["start"])
    paged = paged_attention(inputs["position"][:B], entries, chunk)
    if shape.kind == "decode":
        return lambda q, k, v, layer: paged(q, layer)
    gathered = gathered_attention(inputs, block_tokens)
    is_chunk = (inputs["row"][:B] >= 0)[:, None, None]

    def mixed(q_TNH: Array, k: Array, v: Array, layer: LayerCache) -> Array:
        out_TNH = gathered(q_TNH, layer)
        first = jnp.where(is_chunk, out_TNH[:B], paged(q_TNH[:B], layer))
        return jnp.concatenate([first, out_TNH[B:]])

    return mixed
