"""Attention of a step; decodes attend in pool order.

In pool order every leading block of the pool finds the query of the decode that owns
it. Gathering each request's blocks instead would write and read its whole context once
more. The keys and values are read once, where they lie, and a short request is not
padded to the longest one. The allocator hands out the lowest free blocks, so that few
blocks lead up to the last one in use.

Shape letters as in `models/transformer.py`; also P leading pool blocks, B decode rows,
G query heads of a kv head, O offsets in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from disagg_jax.engine.attention.gathered import (
    Attention,
    gathered_attention,
    prompt_attention,
)
from disagg_jax.engine.attention.kv_cache import (
    Cache,
    LayerCache,
    write_blocks,
    write_tokens,
)
from disagg_jax.programs import StepShape
from models.layers import einsum
from models.transformer import Attend


def step_attend(
    shape: StepShape, inputs: Mapping[str, Array], pool_blocks: int, block_tokens: int
) -> Attend[Cache]:
    """Return the attention of a step of `shape`: a token sees its request so far.

    Args:
      inputs: the fields of its packed vector, see `packing.fields_of`.
      pool_blocks: blocks of the pool, the scratch block included.
    """
    attention = _step_attention(shape, inputs, pool_blocks, block_tokens)
    write = _step_write(shape, inputs, block_tokens)

    def attend(
        layer: int, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        k, v = (write(*part) for part in zip(cache[layer], (k_TKH, v_TKH), strict=True))
        out_TNH = attention(q_TNH, k_TKH, v_TKH, (k, v))
        return out_TNH, [*cache[:layer], (k, v), *cache[layer + 1 :]]

    return attend


def _step_write(
    shape: StepShape, inputs: Mapping[str, Array], block_tokens: int
) -> Callable[[Array, Array], Array]:
    """Return (k or v of a layer, the tokens' keys or values) -> written k or v."""

    def write(part: Array, x_TKH: Array) -> Array:
        if shape.kind != "decode":
            token_WO = inputs["write_token"].reshape(-1, block_tokens)
            keep = shape.kind == "mixed"  # a chunk can begin inside a block
            part = write_blocks(part, inputs["write_block"], token_WO, x_TKH, keep=keep)
        if B := shape.decodes:
            part = write_tokens(part, inputs["slot"], x_TKH[:B])
        return part

    return write


def _step_attention(
    shape: StepShape, inputs: Mapping[str, Array], pool_blocks: int, block_tokens: int
) -> Callable[[Array, Array, Array, LayerCache], Array]:
    """Return (queries, their keys, their values, layer's cache) -> outputs."""
    if shape.kind == "prefill":
        return lambda q, k, v, _: prompt_attention(inputs["row"], q, k, v)
    B, owner, start = shape.decodes, inputs["owner"], inputs["start"]
    if shape.blocks == pool_blocks - 1:
        # The whole pool is read with its scratch block, which nobody owns: XLA copies
        # a slice. m32 on a CPU, 1023 blocks: 61 ms a step sliced, 28 ms whole.
        owner, start = jnp.append(owner, -1), jnp.append(start, 0)
    position_B = inputs["position"][:B]
    in_pool_order = _pool_attention(position_B, owner, start, block_tokens)
    if shape.kind == "decode":
        return lambda q, k, v, layer: in_pool_order(q, layer)
    gathered = gathered_attention(inputs, block_tokens)
    is_chunk = (inputs["row"][:B] >= 0)[:, None, None]

    def mixed(q_TNH: Array, k: Array, v: Array, layer: LayerCache) -> Array:
        out_TNH = gathered(q_TNH, layer)
        if not B:
            return out_TNH
        first = jnp.where(is_chunk, out_TNH[:B], in_pool_order(q_TNH[:B], layer))
        return jnp.concatenate([first, out_TNH[B:]])

    return mixed


def _pool_attention(
    position_B: Array, owner_P: Array, start_P: Array, block_tokens: int
) -> Attention:
    """Return the attention of one query a row, in pool order."""
    if position_B.shape[0] == 1:
        # XLA makes a product of one row a broadcast and fuses the row's computation
        # into it: the query was rotated once for each block. Two rows stay a product.
        # tiny on a CPU, 256 blocks: 1.67 ms a step with one row, 1.30 with two.
        two = _pool_attention(jnp.repeat(position_B, 2), owner_P, start_P, block_tokens)
        return lambda q_BNH, layer: two(jnp.repeat(q_BNH, 2, 0), layer)[:1]
    B, P = position_B.shape[0], owner_P.shape[0]
    owned_BP = owner_P[None, :] == jnp.arange(B)[:, None]
    owner_P = jnp.maximum(owner_P, 0)
    position_PO = start_P[:, None] + jnp.arange(block_tokens)[None, :]
    used_P = owned_BP.any(0)
    seen_PO = (position_PO <= position_B[owner_P][:, None]) & used_P[:, None]
    seen = seen_PO[:, None, None, :]
    lowest = jnp.finfo(jnp.float32).min

    def attend(q_BNH: Array, layer: LayerCache) -> Array:
        k_PKOH, v_PKOH = (part[:P] for part in layer)
        N, H = q_BNH.shape[1:]
        K = k_PKOH.shape[1]
        # A product, not a gather: a gather takes a float at a time, which was 14 % of a
        # step of 16 rows of SmolLM2 on a core.
        q_PKGH = einsum(
            "BP,BKGH->PKGH",
            owned_BP.astype(q_BNH.dtype),
            q_BNH.reshape(B, K, N // K, H),
        )
        scores = einsum("PKGH,PKOH->PKGO", q_PKGH, k_PKOH, jnp.float32) * H**-0.5
        scores = jnp.where(seen, scores, lowest)
        # Softmax over all blocks of a row: its maximum, then weights relative to that.
        max_PKG = scores.max(-1)
        max_BKG = jnp.where(owned_BP[:, :, None, None], max_PKG[None], lowest).max(1)
        weights = jnp.where(seen, jnp.exp(scores - max_BKG[owner_P][..., None]), 0.0)
        owned = owned_BP.astype(jnp.float32)
        total_BKG = einsum("BP,PKG->BKG", owned, weights.sum(-1))
        part = einsum(
            "PKGO,PKOH->PKGH", weights.astype(v_PKOH.dtype), v_PKOH, jnp.float32
        )
        # Every row sums over all blocks, and 0 * NaN of a free block would be NaN.
        part = jnp.where(used_P[:, None, None, None], part, 0.0)
        out = einsum("BP,PKGH->BKGH", owned, part)
        # A padding row owns no block: 0 / 1.
        out = out / jnp.maximum(total_BKG, 1e-30)[..., None]
        return out.astype(q_BNH.dtype).reshape(B, N, H)

    return attend
