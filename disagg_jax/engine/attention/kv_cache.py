"""The paged KV cache of a stage: its layout, and what writes it and moves its blocks.

A layer's cache is two arrays (k, v) of shape [blocks, K_tensor, block_tokens, H]; a
layer group's cache is a list of them. Each layer has arrays of its own because XLA
would copy a layer out of a stacked array before a matmul reads it.

Shape letters as in `models/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from disagg_jax.deployment import KVMemory
from models.config import ModelConfig

LayerCache = tuple[Array, Array]  # k, v
Cache = list[LayerCache]
AXES = ("blocks", "kv_heads", "length", "head_dim")  # of k and of v
PAYLOAD_AXES = ("blocks", "kv_heads")  # of an array of a payload, see `gather`

# Every index comes from a block table and padding goes to the scratch block, so nothing
# is out of bounds; saying so keeps XLA from adding a bounds mask to each access.
IN_BOUNDS = "promise_in_bounds"


def part_spec(
    config: ModelConfig, memory: KVMemory, kv_slots: int, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    """Return k, or v, of a layer: the pool's blocks and the scratch block after them.

    Args:
      kv_slots: kv heads of all devices of the mesh, repeated and padded ones included.
    """
    shape = (memory.num_blocks + 1, kv_slots, memory.block_tokens, config.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=sharding)


def write_tokens(part: Array, slot_B: Array, x_BKH: Array) -> Array:
    """Put the key, or value, of each decode into its slot, in place under donation.

    Args:
      part: k or v of a layer.
      slot_B: block * block_tokens + offset.
    """
    if slot_B.shape[0] == 1:
        # XLA turns a scatter of one row into the update of a slice, computes that once
        # more inside the reader of the cache, and so copies the whole pool before. Two
        # equal rows stay a scatter.
        slot_B, x_BKH = jnp.repeat(slot_B, 2, 0), jnp.repeat(x_BKH, 2, 0)
    block_B, offset_B = jnp.divmod(slot_B, part.shape[2])
    return part.at[block_B, :, offset_B].set(x_BKH, mode=IN_BOUNDS)


def write_blocks(
    part: Array, block_W: Array, token_WO: Array, x_TKH: Array, *, keep: bool
) -> Array:
    """Put keys, or values, of prompts into whole blocks, in place under donation.

    Token by token, XLA for TPUs copies the whole pool for 1024 tokens and more.

    Args:
      part: k or v of a layer.
      token_WO: which of the T tokens goes to each offset of a block; -1 for none.
      keep: whether offsets without a token keep what they have; otherwise they become
        0, which saves reading the blocks.
    """
    x_WOKH = x_TKH.at[jnp.maximum(token_WO, 0)].get(mode=IN_BOUNDS)
    old = part.at[block_W].get(mode=IN_BOUNDS) if keep else jnp.zeros((), part.dtype)
    is_none = (token_WO < 0)[:, None, :, None]
    new_WKOH = jnp.where(is_none, old, x_WOKH.swapaxes(1, 2))
    return part.at[block_W].set(new_WKOH, mode=IN_BOUNDS)


def gather(
    cache: Cache, ids: Array, *, pieces: int, together: int
) -> list[list[Array]]:
    """Take the blocks `ids` of a device's part of the cache, in pieces of kv heads.

    Returns:
      For each piece k and v of each layer in turn, `together` of them one after another
      in an array `[together * len(ids), heads of a piece * block_tokens * H]`.
    """
    rows = [_rows(part, pieces) for pair in cache for part in pair]

    def take(piece: int, start: int) -> Array:
        some = rows[start : start + together]
        return jnp.concatenate([r.at[ids, piece].get(mode=IN_BOUNDS) for r in some])

    starts = range(0, len(rows), together)
    return [[take(piece, start) for start in starts] for piece in range(pieces)]


def insert(
    cache: Cache, ids: Array, pieces: Sequence[Sequence[Array]]
) -> tuple[Cache, Array]:
    """Write pieces side by side into a device's blocks `ids`; (cache, done)."""
    rows = [_rows(part, len(pieces)) for pair in cache for part in pair]
    first, blocks = ids[0], ids.shape[0]
    if blocks == 1:  # as in `write`: the pool was copied
        ids = jnp.repeat(ids, 2)
    for piece, arrays in enumerate(pieces):
        new = [x for a in arrays for x in jnp.split(a, a.shape[0] // blocks)]
        new = [jnp.broadcast_to(x, (ids.shape[0], x.shape[1])) for x in new]
        rows = [
            r.at[ids, piece].set(x, mode=IN_BOUNDS)
            for r, x in zip(rows, new, strict=True)
        ]
    shape = cache[0][0].shape
    parts = [r.reshape(shape) for r in rows]
    return list(zip(parts[::2], parts[1::2], strict=True)), first


def _rows(part: Array, pieces: int) -> Array:
    """Return k or v as `[blocks, pieces, heads of a piece * block_tokens * H]`.

    XLA copies long rows faster than many short ones: taking 128 MiB out of a pool took
    30 ms with heads, offsets and head_dim as dimensions, and takes 20 ms. XLA also
    copies updates first unless they come as rows.
    """
    return part.reshape(part.shape[0], pieces, -1)
