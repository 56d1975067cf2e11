"""Attention of whole prompts on Hopper GPUs: a Pallas kernel for Mosaic GPU.

**Compiled for an H100, never run on one.** See `mosaic_gpu_decodes.py`.

A warpgroup takes 64 tokens and a query head, and goes over the keys from the beginning
of the first token's prompt to the last token (flash attention). Scores never leave it:
plain XLA writes them to memory and reads them again.

Shape letters as in `models/transformer.py`; also R queries and O keys of a tile, D
tiles of K and V in shared memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from disagg_jax.engine.attention import mosaic_gpu_decodes
from disagg_jax.engine.attention.kernel import KernelCost
from disagg_jax.engine.attention.mosaic_gpu_decodes import TILE

KERNEL = "mosaic_gpu_prompt_attention"  # its name in a compiled program


def kernel_cost(tokens: int, heads: int, kv_heads: int, head_dim: int) -> KernelCost:
    """State the cost of a call with one prompt; with several it computes less.

    K and V count once: for all other tiles of queries they are in the L2 cache.
    """
    tiles = -(-tokens // TILE)
    size_bytes = 2 * 2 * (heads + kv_heads) * tiles * TILE * head_dim
    pairs = tiles * (tiles + 1) // 2
    flops = pairs * heads * 4 * TILE * TILE * head_dim
    return KernelCost(size_bytes=size_bytes + 4 * tiles * TILE, flops=flops)


def prompt_attention(q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array) -> Array:
    """Attend from each token of whole prompts to its row, up to itself.

    It means what `gathered.prompt_attention` does, for what `problem` has nothing
    against (`mosaic_gpu_decodes.py`).
    """
    T = row_T.shape[0]
    padding = -T % TILE
    row_T = jnp.pad(row_T, (0, padding), "edge")
    qkv = (jnp.pad(x, [(0, padding), (0, 0), (0, 0)]) for x in (q_TNH, k_TKH, v_TKH))
    is_first_T = jnp.concatenate([jnp.ones(1, bool), row_T[1:] != row_T[:-1]])
    begin_T = lax.cummax(jnp.where(is_first_T, jnp.arange(T + padding), 0))
    return _kernel(T + padding, *q_TNH.shape[1:])(begin_T, *qkv)[:T]


def _kernel(tokens: int, heads: int, head_dim: int):
    """Return (begin of each token's row, q, k, v) -> outputs."""
    depth, scratch_types = mosaic_gpu_decodes.buffers(head_dim)
    begin = plgpu.SMEM((TILE,), jnp.int32)
    return plgpu.kernel(
        functools.partial(_attend_tile, depth=depth),
        out_type=jax.ShapeDtypeStruct((tokens, heads, head_dim), jnp.bfloat16),
        scratch_types=(*scratch_types, begin, plgpu.Barrier()),
        grid=(tokens // TILE, heads),
        grid_names=("tile", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=KERNEL,
    )


def _attend_tile(begin_T, q_TNH, k_TKH, v_TKH, out_TNH, *scratch, depth):
    """Attend with a head's queries of a tile. All are references."""
    q_RH, k_DOH, v_DOH, q_here, kv_here, begin_R, begin_here = scratch
    tiles, head = begin_T.shape[0] // TILE, lax.axis_index("head")
    tile = tiles - 1 - lax.axis_index("tile")  # those with most keys begin first
    kv_head = lax.div(head, q_TNH.shape[1] // k_TKH.shape[1])
    first = lax.div(begin_T[tile * TILE], TILE)
    count = tile + 1 - first
    queries = pl.ds(tile * TILE, TILE)

    def fetch(i) -> None:
        slot, keys = lax.rem(i, depth), pl.ds((first + i) * TILE, TILE)
        for part, buffer in ((k_TKH, k_DOH), (v_TKH, v_DOH)):
            plgpu.copy_gmem_to_smem(
                part.at[keys, kv_head], buffer.at[slot], kv_here.at[slot]
            )

    plgpu.copy_gmem_to_smem(q_TNH.at[queries, head], q_RH, q_here)
    plgpu.copy_gmem_to_smem(begin_T.at[queries], begin_R, begin_here)
    for i in range(depth):
        pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
    plgpu.barrier_wait(q_here)
    plgpu.barrier_wait(begin_here)
    square = TILE, TILE
    begin_RO = lax.broadcast_in_dim(mosaic_gpu_decodes.column(begin_R), square, [0])
    offset_RO = mosaic_gpu_decodes.iota(square, 1)
    ahead_RO = offset_RO - mosaic_gpu_decodes.iota(square, 0)

    def attend_keys(i, found):
        slot = lax.rem(i, depth)
        plgpu.barrier_wait(kv_here.at[slot])
        start = (first + i) * TILE
        seen_RO = (offset_RO + start >= begin_RO) & (ahead_RO + start <= tile * TILE)
        found = mosaic_gpu_decodes.softmax_step(
            q_RH, k_DOH.at[slot], v_DOH.at[slot], seen_RO, found
        )
        pl.when(i + depth < count)(lambda: mosaic_gpu_decodes.refill(fetch, i + depth))
        return found

    found = mosaic_gpu_decodes.nothing_found(q_RH.shape[1])
    _, total_R, out_RH = lax.fori_loop(0, count, attend_keys, found)
    out_RH = out_RH / lax.broadcast_in_dim(total_R, out_RH.shape, [0])
    q_RH[...] = out_RH.astype(q_RH.dtype)  # all tiles have seen the queries
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_RH, out_TNH.at[queries, head])
    plgpu.wait_smem_to_gmem(0)
