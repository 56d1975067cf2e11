"""Attention of decodes on Hopper GPUs: a Pallas kernel for Mosaic GPU.

**Compiled for an H100, never run on one.** Its arithmetic and most of its barriers are
tested in JAX's interpreter, its wgmmas are not: `tests/engine/test_mosaic_gpu.py`.

A row's entries are cut into *items* of about equal size, so that few long rows fill a
GPU too (flash-decoding). A warpgroup takes an item and a kv head. It copies blocks of K
and V into a ring of buffers in shared memory while it multiplies those before, and
keeps a running softmax in registers (Milakov & Gimelshein 2018). Tensor cores take 64
rows at a time, of which the queries of a kv head fill at most G: the others are
whatever is in shared memory, and nothing reads what comes of them. That is little work:
64 rows take 2.1 MFLOP for the 32 KiB of a block of 128 x 64, a quarter of an H100's
peak at its full bandwidth.

Last, XLA weighs the items of a row. All sums have an order of their own: equal inputs
give equal bits.

Shape letters as in `paged.py`; also W items, M items of a row at most, Q queries of a
kv head with padding.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kernel import KernelCost
from disagg_jax.engine.attention.kv_cache import IN_BOUNDS, LayerCache

KERNEL = "mosaic_gpu_decode_attention"  # its name in a compiled program

TILE = 64  # queries of a wgmma; also tokens of a block
# Of shared memory for K and V: an SM of Hopper has 227 KiB, for two warpgroups.
_BUFFER_BYTES = 96 * 2**10
_WARPGROUPS = 4 * 132  # that a call should have: twice what an H100 runs at a time
_FEWEST_ENTRIES = 4  # of an item, or its start would take longer than its blocks
_FEWEST_SPLITS = 8  # that a long row among many can have
_BYTES = 2  # of a bfloat16
_LOWEST = -1e30  # a score of what is not seen; finite, since inf - inf is NaN


class Items(NamedTuple):
    """Runs of a row's entries; of unused items the count is 0."""

    row_W: Array
    first_W: Array  # entry
    count_W: Array  # of entries
    items_B: Array  # of each row; they lie one after the other


class Grid(NamedTuple):
    """The sizes that a call has for all its rows, whatever their lengths."""

    entries: int  # of an item, unless its row would have too many items
    items: int  # of all rows
    splits: int  # items of a row

    @classmethod
    def of(cls, rows: int, entries: int, kv_heads: int) -> Grid:
        size = max(_FEWEST_ENTRIES, -(-entries * kv_heads // _WARPGROUPS))
        splits = max(_FEWEST_SPLITS, -(-_WARPGROUPS // (rows * kv_heads)))
        return cls(
            entries=size,
            items=min(entries, rows + entries // size),
            splits=min(splits, -(-entries // size)),
        )


def kernel_cost(
    rows: int, entries: int, heads: int, kv_heads: int, head_dim: int
) -> KernelCost:
    """State the cost of the kernel named `KERNEL`, if no entry is padding.

    What XLA does before and after it is not in this. FLOPs are those of tensor cores,
    for 64 queries a kv head; 64 / G times what attention needs.

    Args:
      heads: of queries on the device.
    """
    items = Grid.of(rows, entries, kv_heads).items
    queries = kv_heads * _padded(heads // kv_heads)  # of an item
    kv_bytes = entries * kv_heads * 2 * TILE * head_dim * _BYTES
    q_and_out_bytes = 2 * items * queries * head_dim * _BYTES
    numbers_bytes = 4 * (4 * items + 2 * entries + items * queries)
    return KernelCost(
        size_bytes=kv_bytes + q_and_out_bytes + numbers_bytes,
        flops=entries * kv_heads * 4 * TILE * TILE * head_dim,
    )


def _padded(queries: int) -> int:
    """Return the queries of a kv head with padding: tiles have 8 rows."""
    return -(-queries // 8) * 8


def decode_attention(
    q_BNH: Array, layer: LayerCache, position_B: Array, entries: Entries
) -> Array:
    """Attend from one query a row to the blocks of its entries.

    It means what `paged.paged_attention` does, for what `problem` has nothing against.
    """
    B, N, H = q_BNH.shape
    k, v = layer
    K = k.shape[1]
    G = N // K
    assert not problem(q_BNH.dtype.name, k.shape[2], H, G), (q_BNH, k)
    grid = Grid.of(B, entries.owner_P.shape[0], K)
    items = split_rows(position_B, entries, grid)
    q_BKGH = q_BNH.reshape(B, K, G, H)
    q_BKQH = jnp.pad(q_BKGH, [(0, 0), (0, 0), (0, _padded(G) - G), (0, 0)])
    position_W = position_B.at[items.row_W].get(mode=IN_BOUNDS)
    numbers = jnp.stack([items.row_W, position_W, items.first_W, items.count_W])
    run = _kernel(grid.items, q_BKQH.shape)
    out_WKQH, lse_WKQ = run(numbers, entries.block_P, entries.start_P, q_BKQH, k, v)
    out_BKGH = join_items(
        items.items_B, grid.splits, out_WKQH[:, :, :G], lse_WKQ[:, :, :G]
    )
    return out_BKGH.astype(q_BNH.dtype).reshape(B, N, H)


def problem(dtype: str, block_tokens: int, head_dim: int, group: int) -> str:
    """Say what the kernel is not for; "" if it is for this.

    Args:
      group: query heads of a kv head.
    """
    if dtype != "bfloat16":
        return "expected bfloat16"
    if block_tokens != TILE:
        return f"expected blocks of {TILE} tokens, got {block_tokens}"
    if head_dim not in (64, 128, 256):
        return f"expected a head_dim of 64, 128 or 256, got {head_dim}"
    return "" if group <= TILE else f"expected at most {TILE} query heads a kv head"


def split_rows(position_B: Array, entries: Entries, grid: Grid) -> Items:
    """Cut the entries of each row into items, but for padding at the list's end."""
    owner_P, (B,), (P,) = entries.owner_P, position_B.shape, entries.owner_P.shape
    seen_P = entries.start_P <= position_B.at[owner_P].get(mode=IN_BOUNDS)
    used = jnp.where(seen_P, jnp.arange(1, P + 1), 0).max()
    # All at once: a search by halves would be a loop of small kernels.
    row_B = jnp.arange(B)
    first_B = (owner_P[None, :] < row_B[:, None]).sum(1)
    end_B = jnp.minimum((owner_P[None, :] <= row_B[:, None]).sum(1), used)
    count_B = jnp.maximum(end_B - first_B, 0)
    splits_B = jnp.clip(-(-count_B // grid.entries), 1, grid.splits)
    size_B = jnp.maximum(-(-count_B // splits_B), 1)
    items_B = -(-count_B // size_B)
    end_item_B = jnp.cumsum(items_B)
    index_W = jnp.arange(grid.items)
    row_W = jnp.minimum((end_item_B[None, :] <= index_W[:, None]).sum(1), B - 1)
    size_W, count_W, first_W, first_item_W = (
        x.at[row_W].get(mode=IN_BOUNDS)
        for x in (size_B, count_B, first_B, end_item_B - items_B)
    )
    done_W = (index_W - first_item_W) * size_W  # entries of the row's items before
    left_W = jnp.clip(count_W - done_W, 0, size_W)
    return Items(row_W, first_W + done_W, left_W, items_B)


def join_items(items_B: Array, splits: int, out_WKGH: Array, lse_WKG: Array) -> Array:
    """Return the outputs of rows `[B, K, G, H]` in float32; 0 of rows without items.

    Args:
      items_B: of each row.
      splits: the most of them.
      lse_WKG: log2 of the sum of an item's weights.
    """
    first_B = jnp.cumsum(items_B) - items_B
    index_M = jnp.arange(splits)
    is_item_BM = index_M[None, :] < items_B[:, None]
    item_BM = jnp.where(is_item_BM, first_B[:, None] + index_M[None, :], 0)
    # What is in unused items was never written: it can be NaN.
    lse_BMKG = lse_WKG.at[item_BM].get(mode=IN_BOUNDS)
    lse_BMKG = jnp.where(is_item_BM[:, :, None, None], lse_BMKG, _LOWEST)
    weight_BMKG = jnp.exp2(lse_BMKG - lse_BMKG.max(1, keepdims=True))
    out_BMKGH = out_WKGH.at[item_BM].get(mode=IN_BOUNDS).astype(jnp.float32)
    out_BMKGH = jnp.where(is_item_BM[:, :, None, None, None], out_BMKGH, 0)
    out_BKGH = (weight_BMKG[..., None] * out_BMKGH).sum(1)
    return out_BKGH / weight_BMKG.sum(1)[..., None]


# -- the kernel ----------------------------------------------------------------------


def _kernel(items: int, q_shape: tuple[int, ...]):
    """Return (numbers of items, blocks, starts, q, k, v) -> items' outputs, sums."""
    _, K, Q, H = q_shape
    dtype = jnp.bfloat16
    depth, scratch_types = buffers(H)
    return plgpu.kernel(
        functools.partial(_attend_item, depth=depth),
        out_type=(
            jax.ShapeDtypeStruct((items, K, Q, H), dtype),
            jax.ShapeDtypeStruct((items, K, Q), jnp.float32),
        ),
        scratch_types=(*scratch_types, plgpu.SMEM((TILE,), jnp.float32)),
        grid=(items, K),
        grid_names=("item", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=KERNEL,
    )


def _attend_item(
    numbers,
    block_P,
    start_P,
    q_BKQH,
    k_pool,
    v_pool,
    out_WKQH,
    lse_WKQ,
    *scratch,
    depth,
):
    """Attend with a kv head's queries to the blocks of an item. All are references."""
    q_RH, k_DOH, v_DOH, q_here, kv_here, lse_R = scratch
    item, head = lax.axis_index("item"), lax.axis_index("head")
    row, position, first, count = (numbers[i, item] for i in range(4))
    queries = pl.ds(0, q_BKQH.shape[2])
    H = q_RH.shape[1]

    def fetch(i) -> None:
        slot, block = lax.rem(i, depth), block_P[first + i]
        for pool, buffer in ((k_pool, k_DOH), (v_pool, v_DOH)):
            plgpu.copy_gmem_to_smem(
                pool.at[block, head], buffer.at[slot], kv_here.at[slot]
            )

    def attend_block(i, found):
        slot = lax.rem(i, depth)
        last = position - start_P[first + i]  # offset that is seen
        plgpu.barrier_wait(kv_here.at[slot])
        pl.when(last < TILE - 1)(lambda: _clear_after(last, v_DOH.at[slot]))
        seen_RO = iota((TILE, TILE), 1) <= last
        found = softmax_step(q_RH, k_DOH.at[slot], v_DOH.at[slot], seen_RO, found)
        pl.when(i + depth < count)(lambda: refill(fetch, i + depth))
        return found

    @pl.when(count > 0)
    def _():
        plgpu.copy_gmem_to_smem(q_BKQH.at[row, head], q_RH.at[queries], q_here)
        for i in range(depth):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
        plgpu.barrier_wait(q_here)
        found = lax.fori_loop(0, count, attend_block, nothing_found(H))
        max_R, total_R, out_RH = found
        out_RH = out_RH / lax.broadcast_in_dim(total_R, out_RH.shape, [0])
        q_RH[...] = out_RH.astype(q_RH.dtype)  # all blocks have seen the queries
        lse_R[...] = max_R + jnp.log(total_R) * math.log2(math.e)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_RH.at[queries], out_WKQH.at[item, head])
        plgpu.copy_smem_to_gmem(lse_R.at[queries], lse_WKQ.at[item, head])
        plgpu.wait_smem_to_gmem(0)


def _clear_after(last, v_OH) -> None:
    """Put zeros into the offsets after `last`: a weight of 0 times NaN is NaN."""
    kept = iota(v_OH.shape, 0) <= last
    v_OH[...] = jnp.where(kept, v_OH[...], jnp.zeros((), v_OH.dtype))
    plgpu.commit_smem()


# -- of a tile of queries and one of keys; also for prompts ----------------------------


def buffers(head_dim: int):
    """Return how many tiles of K and V there is room for, and the shared memory.

    That is of queries, of K and V, and barriers: that the queries are here, and that a
    tile of K and one of V are.
    """
    dtype = jnp.bfloat16
    depth = max(2, _BUFFER_BYTES // (2 * TILE * head_dim * _BYTES))
    # What a wgmma takes: tiles of 8 rows of 128 bytes.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    queries = plgpu.SMEM((TILE, head_dim), dtype, transforms=transforms)
    kv = plgpu.SMEM((depth, TILE, head_dim), dtype, transforms=transforms)
    here = plgpu.Barrier(num_arrivals=2, num_barriers=depth)
    return depth, (queries, kv, kv, plgpu.Barrier(), here)


def refill(fetch, i) -> None:
    """Fetch tile `i` of K and V into buffers that were read, once all warps have.

    A product is over for a warp when its own rows are; one thread asks for the copy.
    """
    plgpu.commit_smem()
    fetch(i)


def nothing_found(head_dim: int):
    """Return highest scores, sums of weights and outputs before any key."""
    return full((TILE,), _LOWEST), full((TILE,), 0.0), full((TILE, head_dim), 0.0)


def softmax_step(q_RH, k_OH, v_OH, seen_RO, found):
    """Return `found` with the keys of one more tile; scores are in bits."""
    max_R, total_R, out_RH = found
    scores_RO = _scores(q_RH, k_OH) * (q_RH.shape[1] ** -0.5 * math.log2(math.e))
    # Where nothing is seen weights are 1; what is seen afterwards makes them 0.
    scores_RO = jnp.where(seen_RO, scores_RO, _LOWEST)
    new_R = jnp.maximum(max_R, scores_RO.max(1))
    before_R = jnp.exp2(max_R - new_R)
    weight_RO = jnp.exp2(scores_RO - lax.broadcast_in_dim(new_R, scores_RO.shape, [0]))
    total_R = total_R * before_R + weight_RO.sum(1)
    out_RH = out_RH * lax.broadcast_in_dim(before_R, out_RH.shape, [0])
    return new_R, total_R, _add_values(out_RH, weight_RO.astype(v_OH.dtype), v_OH)


def _scores(q_RH, k_OH):
    """Return the products of queries and keys, `[R, O]`."""

    def multiply(found):
        plgpu.wgmma(found, q_RH, k_OH.transpose((1, 0)))
        return found[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32))


def _add_values(out_RH, weight_RO, v_OH):
    """Return `out_RH` and the weighted values."""

    def multiply(found) -> None:
        plgpu.wgmma(found, weight_RO, v_OH)

    return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(out_RH))


def iota(shape, dimension):
    """Return indices along a dimension, laid out as scores are."""
    layout = plgpu.Layout.WGMMA
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout)


def full(shape, value):
    """Return a value everywhere, laid out as scores are, or as their rows."""
    layout = plgpu.Layout.WGMMA
    return plgpu.layout_cast(
        jnp.full(shape, value, jnp.float32),
        layout if len(shape) == 2 else layout.reduce(1),
    )


def column(values_R):
    """Return what a reference holds, a value for each query."""
    return plgpu.layout_cast(values_R[...], plgpu.Layout.WGMMA.reduce(1))
