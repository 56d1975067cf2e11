"""The paged KV cache of a stage: its layout, and what writes it and moves its blocks.

A layer's cache is two arrays (k, v) of shape [blocks, K_tensor, block_tokens, H]; a
layer group's cache is a list of them. Each layer has arrays of its own because XLA
would copy a layer out of a stacked array before a matmul reads it.

Shape letters as in `models/transformer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from disagg_jax.deployment import KVMemory
from models.config import ModelConfig

LayerCache = tuple[Array, Array]  # k, v
Cache = list[LayerCache]
Shape = tuple[int, ...]
AXES = ("blocks", "kv_heads", "length", "head_dim")  # of k and of v
PAYLOAD_AXES = ("blocks", "kv_heads")  # of an array of a payload, see `gather`

# Every index comes from a block table and padding goes to the scratch block, so nothing
# is out of bounds; saying so keeps XLA from adding a bounds mask to each access.
IN_BOUNDS = "promise_in_bounds"

_LANES = 128  # last dimension of a TPU's tile


def part_spec(
    config: ModelConfig, memory: KVMemory, kv_slots: int, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    """Return k, or v, of a layer: the pool's blocks and the scratch block after them.

    On a TPU head_dim is padded to whole tiles: XLA has another layout for 64, and
    copied the pool between the two in every step, 4 to 6 times a layer.

    Args:
      kv_slots: kv heads of all devices of the mesh, repeated and padded ones included.
    """
    assert isinstance(sharding.mesh, Mesh)
    padding = -config.head_dim % _LANES if is_tiled(sharding.mesh) else 0
    head_dim = config.head_dim + padding
    shape = (memory.num_blocks + 1, kv_slots, memory.block_tokens, head_dim)
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
    x_BKH = _padded(x_BKH, part)
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
    x_WOKH = _padded(x_TKH, part).at[jnp.maximum(token_WO, 0)].get(mode=IN_BOUNDS)
    old = part.at[block_W].get(mode=IN_BOUNDS) if keep else jnp.zeros((), part.dtype)
    is_none = (token_WO < 0)[:, None, :, None]
    new_WKOH = jnp.where(is_none, old, x_WOKH.swapaxes(1, 2))
    return part.at[block_W].set(new_WKOH, mode=IN_BOUNDS)


def read_blocks(part: Array, block_C: Array, head_dim: int) -> Array:
    """Return blocks `[C, K, block_tokens, head_dim]` of k or v, without padding."""
    return part.at[block_C].get(mode=IN_BOUNDS)[..., :head_dim]


def _padded(x: Array, part: Array) -> Array:
    """Return `[..., H]` with zeros up to the head_dim of `part`."""
    padding = part.shape[-1] - x.shape[-1]
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, padding)]) if padding else x


def gather(
    cache: Cache, ids: Array, *, pieces: int, together: int, tiled: bool
) -> list[list[Array]]:
    """Take the blocks `ids` of a device's part of the cache, in pieces of kv heads.

    Args:
      tiled: see `is_tiled`.

    Returns:
      For each piece k and v of each layer in turn, `together` of them one after another
      in an array `[together * len(ids), *piece_shape(heads of a piece)]`.
    """
    parts = [_by_piece(part, pieces, tiled) for pair in cache for part in pair]

    def take(piece: int, start: int) -> Array:
        some, at = parts[start : start + together], ids * pieces + piece
        return jnp.concatenate([part.at[at].get(mode=IN_BOUNDS) for part in some])

    starts = range(0, len(parts), together)
    return [[take(piece, start) for start in starts] for piece in range(pieces)]


def insert(
    cache: Cache, ids: Array, pieces: Sequence[Sequence[Array]], *, tiled: bool
) -> tuple[Cache, Array]:
    """Write pieces side by side into a device's blocks `ids`; (cache, done)."""
    parts = [_by_piece(part, len(pieces), tiled) for pair in cache for part in pair]
    first, blocks = ids[0], ids.shape[0]
    if blocks == 1:  # as in `write_tokens`: the pool was copied
        ids = jnp.repeat(ids, 2)
    for piece, arrays in enumerate(pieces):
        new = [x for a in arrays for x in jnp.split(a, a.shape[0] // blocks)]
        new = [jnp.broadcast_to(x, (ids.shape[0], *x.shape[1:])) for x in new]
        at = ids * len(pieces) + piece
        parts = [
            part.at[at].set(x, mode=IN_BOUNDS)
            for part, x in zip(parts, new, strict=True)
        ]
    shape = cache[0][0].shape
    parts = [part.reshape(shape) for part in parts]
    return list(zip(parts[::2], parts[1::2], strict=True)), first


def is_tiled(mesh: Mesh) -> bool:
    """Return whether devices keep an array in tiles of its last two dimensions.

    A TPU does. There a block stays `[heads, block_tokens, H]` while it moves: as a row
    it has other tiles, for which XLA rewrote the whole pool, up to 130 times the bytes
    of 2048 tokens. Elsewhere a block moves as a row, which is copied faster: a gather
    of 1 to 128 MiB out of a pool took a CPU up to 1.5 times as long with heads, offsets
    and head_dim as dimensions, and XLA copied updates first that did not come as rows.
    """
    return mesh.devices.flat[0].platform == "tpu"


def piece_shape(part: jax.ShapeDtypeStruct | Array, heads: int, tiled: bool) -> Shape:
    """Return the shape of `heads` kv heads of a block of k or v while they move."""
    shape = (heads, *part.shape[2:])
    return shape if tiled else (math.prod(shape),)


def _by_piece(part: Array, pieces: int, tiled: bool) -> Array:
    """Return k or v as `[blocks * pieces, *piece_shape(heads of a piece)]`.

    So a piece of a block is one index. With one for the block and one for its first
    head a scatter became a loop over blocks on a TPU.
    """
    blocks, heads = part.shape[:2]
    shape = piece_shape(part, heads // pieces, tiled)
    return part.reshape(blocks * pieces, *shape)
