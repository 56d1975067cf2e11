"""The paged KV cache: its layout, and what reads and writes it.

A layer's cache is two arrays (k, v) of shape [blocks, K_tensor, block_tokens, H]; a
layer group's cache is a list of them. Each layer has arrays of its own because XLA
would copy a layer out of a stacked array before a matmul reads it.

Decode attends in *pool order*: instead of gathering each request's blocks (which writes
and reads its whole context once more), every block of the pool's front finds its
owner's query. The keys and values are then read once, where they lie, and a short
request is not padded to the longest one. The allocator hands out the lowest free blocks
to keep that front short.

Chunks of prompts attend to a gathered copy of their requests' blocks: a copy is small
beside what so many queries do with it.

Shape letters as in `models/transformer.py`; also P pool blocks, B decode rows, G query
heads of a kv head, O offsets in a block, C blocks that chunks attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from models.layers import attention, einsum
from models.transformer import Attend

LayerCache = tuple[Array, Array]  # k, v
Cache = list[LayerCache]
AXES = ("blocks", "kv_heads", "length", "head_dim")  # of k and of v
PAYLOAD_AXES = ("blocks", "kv_heads")  # of an array of a payload, see `gather`

# Every index comes from a block table and padding goes to the scratch block, so nothing
# is out of bounds; saying so keeps XLA from adding a bounds mask to each access.
_IN_BOUNDS = "promise_in_bounds"
# Prefill queries that attend at a time: it bounds the score matrix, and keys that come
# after a piece are left out of it. SmolLM2 on a core, 512 tokens, CPU time of attention
# in all layers: 311 ms with 512 at a time, 218 with 256, 201 with 128 (and twice as
# many programs' parts to compile).
_QUERY_CHUNK = 256
# The same for chunks, whose keys can be many more: queries * keys at a time, but for
# at most so many pieces, each of which takes time to compile.
_SCORES = 2**22
_MAX_PIECES = 16
# To send one more array costs about 0.1 ms for each device; to share one costs a copy
# when it is taken apart. m32, TP4 to TP4: 1 MiB took 4.4 ms with k and v of each layer
# apart and 2.4 together; 16 MiB 15.0 and 14.0; 128 MiB 75 and 89 (2 busy cores).
_ARRAY_BYTES = 4 * 2**20


def prefill_attend(row_T: Array, slot_T: Array, block_tokens: int) -> Attend[Cache]:
    """Whole prompts: tokens see the earlier tokens of their own row.

    Args:
      row_T: which prompt a token belongs to; -1 is padding.
      slot_T: where its KV goes: block * block_tokens + offset.
    """
    T = row_T.shape[0]
    index_T = jnp.arange(T)

    def attend(
        layer: int, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        cache = _write(cache, layer, slot_T, block_tokens, k_TKH, v_TKH)
        outs: list[Array] = []
        for start in range(0, T, _QUERY_CHUNK):
            end = min(start + _QUERY_CHUNK, T)
            mask = (row_T[start:end, None] == row_T[None, :end]) & (
                index_T[start:end, None] >= index_T[None, :end]
            )
            outs.append(attention(q_TNH[start:end], k_TKH[:end], v_TKH[:end], mask))
        return jnp.concatenate(outs), cache

    return attend


def decode_attend(
    position_B: Array,
    slot_B: Array,
    owner_P: Array,
    start_P: Array,
    block_tokens: int,
) -> Attend[Cache]:
    """One token for each row: it sees its row's cached context and itself.

    Args:
      position_B: the token's position in its request.
      slot_B: where its KV goes: block * block_tokens + offset.
      owner_P: the row that each block of the pool's front belongs to; -1 is nobody.
      start_P: the position of the block's first token in its request.
    """
    in_pool_order = _pool_attention(position_B, owner_P, start_P, block_tokens)

    def attend(
        layer: int, q_BNH: Array, k_BKH: Array, v_BKH: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        cache = _write(cache, layer, slot_B, block_tokens, k_BKH, v_BKH)
        return in_pool_order(q_BNH, cache[layer]), cache

    return attend


def mixed_attend(
    position_T: Array,
    slot_T: Array,
    chunks: ChunkContext,
    owner_P: Array,
    start_P: Array,
    block_tokens: int,
    decodes: int,
) -> Attend[Cache]:
    """Chunks of prompts, and decodes: each token sees its request's KV up to itself.

    Args:
      position_T: each token's position in its request.
      slot_T: where its KV goes: block * block_tokens + offset.
      chunks: which tokens are chunks, and the blocks that those attend to.
      owner_P: the decode that each block of the pool's front belongs to; -1 is nobody.
      start_P: the position of the block's first token in its request.
      decodes: how many of the first tokens may be decodes.
    """
    B = decodes
    gathered = _gathered_attention(position_T, chunks, block_tokens)
    in_pool_order = _pool_attention(position_T[:B], owner_P, start_P, block_tokens)
    is_chunk = (chunks.row_T[:B] >= 0)[:, None, None]

    def attend(
        layer: int, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        cache = _write(cache, layer, slot_T, block_tokens, k_TKH, v_TKH)
        out_TNH = gathered(q_TNH, cache[layer])
        if B:
            first = in_pool_order(q_TNH[:B], cache[layer])
            first = jnp.where(is_chunk, out_TNH[:B], first)
            out_TNH = jnp.concatenate([first, out_TNH[B:]])
        return out_TNH, cache

    return attend


class ChunkContext(NamedTuple):
    """The chunks of a mixed step and the KV blocks that they attend to."""

    row_T: Array  # the chunk that a token belongs to; -1 is none
    block_C: Array  # which block of the pool
    owner_C: Array  # the chunk that it belongs to; -1 is padding
    start_C: Array  # the position of its first token in the request


Attention = Callable[[Array, LayerCache], Array]  # (queries, layer's cache) -> outputs


def _gathered_attention(
    position_T: Array, chunks: ChunkContext, block_tokens: int
) -> Attention:
    """Attention of chunks to copies of their blocks, with a mask."""
    offset_O = jnp.arange(block_tokens)
    position_S = (chunks.start_C[:, None] + offset_O[None, :]).reshape(-1)
    owner_S = jnp.repeat(chunks.owner_C, block_tokens)
    seen_TS = (
        (chunks.row_T[:, None] == owner_S[None, :])
        & (owner_S >= 0)[None, :]
        & (position_S[None, :] <= position_T[:, None])
    )
    used_S = seen_TS.any(0)
    T, S = seen_TS.shape
    piece = max(min(_QUERY_CHUNK, _SCORES // S), -(-T // _MAX_PIECES))

    def attend(q_TNH: Array, layer: LayerCache) -> Array:
        k, v = (part.at[chunks.block_C].get(mode=_IN_BOUNDS) for part in layer)
        k_SKH, v_SKH = (
            part.swapaxes(1, 2).reshape(S, -1, k.shape[-1]) for part in (k, v)
        )
        # Weights of what nobody sees are 0, and 0 * NaN would be NaN.
        v_SKH = jnp.where(used_S[:, None, None], v_SKH, 0)
        outs = [
            attention(q_TNH[i : i + piece], k_SKH, v_SKH, seen_TS[i : i + piece])
            for i in range(0, T, piece)
        ]
        return jnp.concatenate(outs)

    return attend


def _pool_attention(
    position_B: Array, owner_P: Array, start_P: Array, block_tokens: int
) -> Attention:
    """Attention of one query a row, in pool order."""
    if position_B.shape[0] == 1:
        # XLA makes a product of one row a broadcast, and fuses into it what makes the
        # row: the query was rotated once for each block. Two rows stay a product.
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
        # A product, not a gather: of a float at a time that took 14 % of a step of 16
        # rows of SmolLM2 on a core.
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
        # Every row sums over all blocks, and 0 * NaN of a free one would be NaN.
        part = jnp.where(used_P[:, None, None, None], part, 0.0)
        out = einsum("BP,PKGH->BKGH", owned, part)
        # A padding row owns nothing: 0 / 1.
        out = out / jnp.maximum(total_BKG, 1e-30)[..., None]
        return out.astype(q_BNH.dtype).reshape(B, N, H)

    return attend


def _write(
    cache: Cache,
    layer: int,
    slot_T: Array,
    block_tokens: int,
    k_TKH: Array,
    v_TKH: Array,
) -> Cache:
    """Puts each token's key and value into its slot, in place under donation."""
    if slot_T.shape[0] == 1:
        # A scatter of one row XLA turns into a slice's update, computes that once more
        # inside what reads the cache, and so copies the whole pool before. Two rows
        # that are equal stay a scatter.
        slot_T, k_TKH, v_TKH = (jnp.repeat(x, 2, 0) for x in (slot_T, k_TKH, v_TKH))
    block_T, offset_T = slot_T // block_tokens, slot_T % block_tokens
    k, v = cache[layer]
    k = k.at[block_T, :, offset_T].set(k_TKH, mode=_IN_BOUNDS)
    v = v.at[block_T, :, offset_T].set(v_TKH, mode=_IN_BOUNDS)
    return [*cache[:layer], (k, v), *cache[layer + 1 :]]


def parts_together(part_bytes: int) -> int:
    """How many parts of `part_bytes` a device share an array of the payload."""
    return max(1, _ARRAY_BYTES // part_bytes)


def gather(
    cache: Cache, ids: Array, *, pieces: int, together: int
) -> list[list[Array]]:
    """The blocks `ids` of a device's part of the cache, cut into pieces of kv heads.

    Returns:
      For each piece k and v of each layer in turn, `together` of them one after another
      in an array `[together * len(ids), heads of a piece * block_tokens * H]`.
    """
    rows = [_rows(part, pieces) for pair in cache for part in pair]

    def take(piece: int, start: int) -> Array:
        some = rows[start : start + together]
        return jnp.concatenate([r.at[ids, piece].get(mode=_IN_BOUNDS) for r in some])

    starts = range(0, len(rows), together)
    return [[take(piece, start) for start in starts] for piece in range(pieces)]


def insert(
    cache: Cache, ids: Array, pieces: Sequence[Sequence[Array]]
) -> tuple[Cache, Array]:
    """Writes pieces side by side into a device's blocks `ids`; (cache, done)."""
    rows = [_rows(part, len(pieces)) for pair in cache for part in pair]
    first, blocks = ids[0], ids.shape[0]
    if blocks == 1:  # as in `_write`: the pool was copied
        ids = jnp.repeat(ids, 2)
    for piece, arrays in enumerate(pieces):
        new = [x for a in arrays for x in jnp.split(a, a.shape[0] // blocks)]
        new = [jnp.broadcast_to(x, (ids.shape[0], x.shape[1])) for x in new]
        rows = [
            r.at[ids, piece].set(x, mode=_IN_BOUNDS)
            for r, x in zip(rows, new, strict=True)
        ]
    shape = cache[0][0].shape
    parts = [r.reshape(shape) for r in rows]
    return list(zip(parts[::2], parts[1::2], strict=True)), first


def _rows(part: Array, pieces: int) -> Array:
    """k or v of a layer as `[blocks, pieces, heads of a piece * block_tokens * H]`.

    XLA copies long rows faster than many short ones: taking 128 MiB out of a pool took
    30 ms with heads, offsets and head_dim as dimensions, and takes 20. And it writes
    only rows that come as rows without copying them first.
    """
    return part.reshape(part.shape[0], pieces, -1)
