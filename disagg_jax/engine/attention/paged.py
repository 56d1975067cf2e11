"""Attention of decodes to the blocks of their block tables.

On a CPU and a TPU a loop takes a chunk of the entries at a time: it gathers their
blocks, attends to each block by itself, and adds up by rows in a running softmax
(Milakov & Gimelshein 2018). Gathered blocks stay in a core's cache, or in VMEM, so that
KV is read from memory once, and each block from end to end. A GPU, which needs all the
parallel work there is, takes all entries at once; products are written as
multiplications and sums, so that XLA reads the blocks where they are.

Scores, weights and sums are float32. Products of float32 are exact (`einsum`). Those of
bfloat16 have bfloat16 operands, the weights of values rounded to it, and add up in
float32; multiplied by element all of it is float32.

Sums have an order of their own for each shape, and on a CPU and a TPU no other: equal
inputs give equal bits. On a GPU the blocks of a row are added in any order, so that a
row of three blocks or more may differ in its last bits from run to run.

Shape letters as in `models/transformer.py`; also B decode rows, P entries, C entries of
a chunk, R rows that a chunk can have, G query heads of a kv head, O offsets in a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from disagg_jax.engine.attention.entries import UNSEEN, Entries
from disagg_jax.engine.attention.kv_cache import IN_BOUNDS, LayerCache, read_blocks
from models.layers import einsum

_LOWEST = float(jnp.finfo(jnp.float32).min)
_SORTED = {"indices_are_sorted": True, "mode": IN_BOUNDS}
# Bytes of K and V that a trip of the loop gathers on a device.
_CHUNK_BYTES = {"cpu": 2**21, "tpu": 2**24}


class Softmax(NamedTuple):
    """The softmax of rows over some of their keys."""

    max_RKG: Array  # highest score
    total_RKG: Array  # of weights, which are relative to the highest score
    out_RKGH: Array  # sum of weighted values


def chunk_entries(platform: str, block_bytes: int) -> int | None:
    """Return how many entries to take at most at a time; None for all, in place.

    Args:
      platform: of the devices, as JAX names it.
      block_bytes: K and V of a block of a layer on one device.
    """
    most = _CHUNK_BYTES.get(platform)
    return most and max(1, most // block_bytes)


def paged_attention(
    q_BNH: Array,
    layer: LayerCache,
    position_B: Array,
    entries: Entries,
    chunk: int | None,
) -> Array:
    """Attend from one query a row to the blocks of its entries.

    Rows without entries get zeros. Nothing reaches a row of what it does not see: other
    blocks, and offsets after its position; also not if there is NaN.

    Args:
      position_B: of the queries; their own KV is in the cache already.
      chunk: see `chunk_entries`.
    """
    B, N, H = q_BNH.shape
    K, P = layer[0].shape[1], entries.owner_P.shape[0]
    # At least two, or there would be no loop: XLA would fuse the computation of queries
    # into the gather, and so rotate a query once for each of its entries.
    trips = max(2, -(-P // chunk)) if chunk else 1
    C = -(-P // trips)  # alike, so that little is padded
    R = min(B, C)
    # A slice beyond the end would be moved to where it fits.
    block, owner, start = (jnp.pad(x, (0, trips * C - P), "edge") for x in entries)
    entries = Entries(block, owner, start.at[P:].set(UNSEEN))
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    zeros_BKG = jnp.zeros(q_BKGH.shape[:-1])
    found = Softmax(zeros_BKG + _LOWEST, zeros_BKG, jnp.zeros(q_BKGH.shape))

    def trip(i: Array, found: Softmax) -> Softmax:
        some = Entries(*(lax.dynamic_slice_in_dim(x, i * C, C) for x in entries))
        first = jnp.minimum(some.owner_P[0], B - R)
        some = some._replace(owner_P=some.owner_P - first)
        rows = (q_BKGH, position_B, *found)
        q, position, *part = (lax.dynamic_slice_in_dim(x, first, R) for x in rows)
        part = _attend(q, position, some, layer, Softmax(*part))
        parts = zip(found, part, strict=True)
        return Softmax(
            *(lax.dynamic_update_slice_in_dim(x, new, first, 0) for x, new in parts)
        )

    if chunk is None:
        found = _attend(q_BKGH, position_B, entries, layer, found, fuse=True)
    else:
        found = lax.fori_loop(0, trips, trip, found)
    out_BKGH = found.out_RKGH / jnp.maximum(found.total_RKG, 1e-30)[..., None]
    return out_BKGH.astype(q_BNH.dtype).reshape(B, N, H)


def _attend(
    q_RKGH: Array,
    position_R: Array,
    entries: Entries,
    layer: LayerCache,
    found: Softmax,
    *,
    fuse: bool = False,
) -> Softmax:
    """Return the softmax of rows over their entries and the keys of `found`.

    Args:
      fuse: whether to multiply by element, so that XLA reads blocks where they are.
    """
    block_C, owner_C, start_C = entries
    k_CKOH, v_CKOH = (read_blocks(part, block_C, q_RKGH.shape[-1]) for part in layer)
    q_CKGH = q_RKGH.at[owner_C].get(mode=IN_BOUNDS)
    position_C = position_R.at[owner_C].get(mode=IN_BOUNDS)
    block_tokens, H = k_CKOH.shape[2:]
    offset_O = jnp.arange(block_tokens)
    seen_CO = start_C[:, None] + offset_O[None, :] <= position_C[:, None]
    seen = seen_CO[:, None, None, :]
    # A weight of 0 alone would not do: 0 * NaN is NaN.
    v_CKOH = jnp.where(seen_CO[:, None, :, None], v_CKOH, 0)
    multiply = _by_element if fuse else einsum
    scores = multiply("CKGH,CKOH->CKGO", q_CKGH, k_CKOH, jnp.float32) * H**-0.5
    scores = jnp.where(seen, scores, _LOWEST)
    # Rows get what their entries have by index. Products with a one-hot matrix take
    # work that grows with rows * entries, and hand the NaN of a row to all others.
    max_RKG = found.max_RKG.at[owner_C].max(scores.max(-1), **_SORTED)
    max_CKG = max_RKG.at[owner_C].get(mode=IN_BOUNDS)
    weights = jnp.where(seen, jnp.exp(scores - max_CKG[..., None]), 0.0)
    total_CKG = weights.sum(-1)
    weights = weights.astype(v_CKOH.dtype)
    out_CKGH = multiply("CKGO,CKOH->CKGH", weights, v_CKOH, jnp.float32)
    before_RKG = jnp.exp(found.max_RKG - max_RKG)
    total_RKG = found.total_RKG * before_RKG
    out_RKGH = found.out_RKGH * before_RKG[..., None]
    return Softmax(
        max_RKG,
        total_RKG.at[owner_C].add(total_CKG, **_SORTED),
        out_RKGH.at[owner_C].add(out_CKGH, **_SORTED),
    )


def _by_element(spec: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """Compute `einsum` of letters of "CKGOH" by multiplications in `dtype` and a sum.

    A product of matrices would have XLA copy its operands first.
    """
    letters = "CKGOH"
    *operands, out = spec.replace("->", ",").split(",")
    x, y = (
        jnp.expand_dims(part, [i for i, c in enumerate(letters) if c not in has])
        for part, has in zip((x, y), operands, strict=True)
    )
    summed = [i for i, c in enumerate(letters) if c not in out]
    return (x.astype(dtype) * y.astype(dtype)).sum(tuple(summed))
