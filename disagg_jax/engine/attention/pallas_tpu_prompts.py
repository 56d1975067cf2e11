"""Attention of whole prompts, and of chunks, on a TPU, as a Pallas kernel.

A flash attention (Dao et al. 2022) with keys in a list: those of the step's prompts, or
of the blocks that chunks attend to, in their order. What a token sees is one span of
that list, since a request's keys lie side by side. So a tile of queries sees a range of
tiles of keys; others are neither read nor multiplied, be they later or another
request's. Blocks come from the pool by the chunks' tables; no copy of them is made.

Precision is that of `pallas_tpu.py`. jax's own kernels (splash attention) read keys of
all prompts before a query, take float32 as bfloat16, and do not say what they move.

Shape letters as in `models/transformer.py`; also C blocks that chunks attend to, Q
queries of a tile, S keys of a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kv_cache import LayerCache
from models.layers import einsum

_KEYS = 512  # of a tile
_QUERIES = 2048  # of a tile, those of all heads of a kv head together
_MOST_BLOCKS = 8  # of a tile, each of which is brought by itself
_SPARE_BYTES = 2**24  # of VMEM, for scores and weights
# The score of a key that is not seen, and half of it the highest score before there is
# any: so the weight of such a key is 0, without a further mask.
_LOWEST = float(jnp.finfo(jnp.float32).min)
_LOG2_E = math.log2(math.e)


class KeySpans(NamedTuple):
    """The keys that each token sees, as indices of the list; none if last < first."""

    first_T: Array
    last_T: Array


class Keys(NamedTuple):
    """The list of keys and values, in tiles."""

    k: Array  # an array with k in it
    v: Array
    block: tuple[int | None, ...]  # of an array that is brought at a time, `[O, H]`
    parts: int  # blocks of a tile
    tiles: int
    index: Callable[..., tuple[Any, ...]]  # (kv head, block, table) -> which block
    table: Array  # int32
    filled: Array  # `[tiles * parts]` keys of a block, from the first on, that are seen


def prompt_attention(
    q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array, *, interpret: bool
) -> Array:
    """Attend from each token of whole prompts to its row, up to itself.

    It means what `gathered.prompt_attention` does; padding, of row -1, gets zeros.

    Args:
      interpret: whether to run without a TPU.
    """
    T, _, H = q_TNH.shape
    size = _tile(T)
    tiles = -(-T // size)
    index_T = jnp.arange(T)
    begins_T = row_T != jnp.roll(row_T, 1)
    first_T = lax.cummax(jnp.where(begins_T, index_T, 0))
    spans = KeySpans(first_T, jnp.where(row_T >= 0, index_T, -1))
    more = (0, tiles * size - T), (0, 0), (0, 0)
    keys = Keys(
        k=jnp.pad(k_TKH, more).swapaxes(0, 1),
        v=jnp.pad(v_TKH, more).swapaxes(0, 1),
        block=(None, size, H),
        parts=1,
        tiles=tiles,
        index=lambda head, block, _: (head, block, 0),
        table=jnp.zeros(1, jnp.int32),
        filled=jnp.full(tiles, size),
    )
    return _flash(q_TNH, spans, keys, H**-0.5, causal=True, interpret=interpret)


def chunk_attention(
    q_TNH: Array,
    layer: LayerCache,
    row_T: Array,
    position_T: Array,
    blocks: Entries,
    *,
    interpret: bool,
) -> Array:
    """Attend from each token of chunks to the blocks of its row, up to itself.

    It means what `gathered.gathered_attention` does; padding gets zeros.

    Args:
      interpret: whether to run without a TPU.
    """
    H = q_TNH.shape[-1]
    _, _, O, cache_H = layer[0].shape  # noqa: E741
    block_C, owner_C, start_C = blocks
    C = block_C.shape[0]
    own_TC = (row_T[:, None] == owner_C[None, :]) & (row_T >= 0)[:, None]
    begins_C = owner_C != jnp.roll(owner_C, 1)
    first_C = O * lax.cummax(jnp.where(begins_C, jnp.arange(C), 0))
    first_T = jnp.where(own_TC, first_C[None, :], 0).max(1)
    spans = KeySpans(first_T, jnp.where(own_TC.any(1), first_T + position_T, -1))
    # A chunk's last token sees all that any of its tokens sees.
    end_C = jnp.where(own_TC, position_T[:, None], -1).max(0) + 1
    parts = max(1, min(_KEYS // O, _MOST_BLOCKS, C))
    tiles = -(-C // parts)
    more = (0, tiles * parts - C)
    keys = Keys(
        *layer,
        block=(None, None, O, cache_H),
        parts=parts,
        tiles=tiles,
        index=lambda head, block, table: (table[block], head, 0, 0),
        table=jnp.pad(block_C, more, "edge"),
        filled=jnp.pad(jnp.clip(end_C - start_C, 0, O), more),
    )
    q_TNH = jnp.pad(q_TNH, ((0, 0), (0, 0), (0, cache_H - H)))
    out_TNH = _flash(q_TNH, spans, keys, H**-0.5, causal=False, interpret=interpret)
    return out_TNH[..., :H]


def _tile(tokens: int) -> int:
    """Return the power of two, of 128 to `_KEYS`, that holds so many tokens."""
    return min(max(128, 2 ** (tokens - 1).bit_length()), _KEYS)


def _flash(
    q_TNH: Array,
    spans: KeySpans,
    keys: Keys,
    scale: float,
    *,
    causal: bool,
    interpret: bool,
) -> Array:
    """Attend from each token to its span of the keys.

    Args:
      causal: whether the list has the tokens' own keys only, so that no token sees one
        at a later index: what is stated as moved then counts no more.
    """
    T, N, H = q_TNH.shape
    K = keys.k.shape[-3]
    G = N // K
    # A power of two, so that it divides what prompts are padded to.
    Q = min(_tile(T), 2 ** ((_QUERIES // G).bit_length() - 1))
    more = (0, -T % Q)
    tiles = (T + more[1]) // Q
    q_TNH = jnp.pad(q_TNH, (more, (0, 0), (0, 0)))
    q_KGTH = q_TNH.reshape(tiles * Q, K, G, H).transpose(1, 2, 0, 3)
    first_T, last_T = (
        jnp.pad(x, more, constant_values=fill)
        for x, fill in zip(spans, (0, -1), strict=True)
    )
    S = keys.parts * (keys.block[-2] or 1)
    rows = pl.BlockSpec((None, G, Q, H), lambda head, tile, *_: (head, 0, tile, 0))
    span = pl.BlockSpec((Q, 1), lambda head, tile, *_: (tile, 0))
    blocks = [
        pl.BlockSpec(keys.block, functools.partial(_block_index, keys, part))
        for part in range(keys.parts)
    ]
    itemsize = keys.k.dtype.itemsize
    vmem_bytes = 2 * (2 * G * Q * H + 2 * S * H) * itemsize + 4 * G * Q * (H + 256)
    out_KGTH = pl.pallas_call(
        functools.partial(_kernel, parts=keys.parts, scale=scale * _LOG2_E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K, tiles, keys.tiles),
            in_specs=[span, span, rows, *blocks, *blocks],
            out_specs=rows,
            scratch_shapes=[
                pltpu.VMEM((G, Q, width), jnp.float32) for width in (1, 1, H)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_KGTH.shape, q_KGTH.dtype),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_bytes + _SPARE_BYTES
        ),
        cost_estimate=_cost(q_KGTH, Q, S, keys.tiles, itemsize, causal=causal),
        interpret=interpret,
        name="prompt_attention" if causal else "chunk_attention",
    )(
        *_key_tiles(first_T.reshape(tiles, Q), last_T.reshape(tiles, Q), S),
        keys.table,
        keys.filled,
        first_T[:, None],
        last_T[:, None],
        q_KGTH,
        *[keys.k] * keys.parts,
        *[keys.v] * keys.parts,
    )
    return out_KGTH.transpose(2, 0, 1, 3).reshape(tiles * Q, N, H)[:T]


def _key_tiles(first_NQ: Array, last_NQ: Array, size: int) -> tuple[Array, Array]:
    """Return the first and the last tile of keys that each tile of queries sees.

    Without any, 0 and -1.
    """
    sees = last_NQ >= first_NQ
    last = jnp.where(sees, last_NQ, -1).max(1)
    first = jnp.where(sees, first_NQ, last[:, None]).min(1)
    return jnp.maximum(first, 0) // size, last // size


def _block_index(
    keys: Keys, part: int, head: Any, tile: Any, step: Any, *scalars: Any
) -> tuple[Any, ...]:
    """Return which block to bring. One that is there already is not brought again."""
    low, high, table, _ = scalars
    step = jnp.maximum(jnp.minimum(step, high[tile]), low[tile])
    return keys.index(head, step * keys.parts + part, table)


def _cost(
    q_KGTH: Array, Q: int, S: int, key_tiles: int, itemsize: int, *, causal: bool
) -> pl.CostEstimate:
    """Return the most that the kernel can have to do: one prompt, or chunk."""
    K, G, T, H = q_KGTH.shape
    seen = [(end - 1) // S + 1 if causal else key_tiles for end in range(Q, T + Q, Q)]
    # A tile of keys stays, from one tile of queries to the next, if it is the only one.
    brought = sum(seen) - seen[:-1].count(1)
    spans_bytes = 2 * 4 * T * (K if len(seen) > 1 else 1)
    scores = K * G * Q * S * sum(seen)
    return pl.CostEstimate(
        flops=4 * scores * H,
        transcendentals=scores,
        bytes_accessed=2 * q_KGTH.size * itemsize
        + 2 * K * brought * S * H * itemsize
        + spans_bytes,
    )


def _kernel(
    low: Any,
    high: Any,
    _: Any,
    filled: Any,
    first_ref: Any,
    last_ref: Any,
    q_ref: Any,
    *refs: Any,
    parts: int,
    scale: float,
) -> None:
    """Attend from a tile of queries to a tile of keys, of one kv head.

    Args:
      scale: of scores whose weights are powers of 2.
    """
    k_refs, v_refs = refs[:parts], refs[parts : 2 * parts]
    out_ref, max_ref, total_ref, sum_ref = refs[2 * parts :]
    tile, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        max_ref[...] = jnp.full_like(max_ref, _LOWEST / 2)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when((low[tile] <= step) & (step <= high[tile]))
    def _() -> None:
        blocks = [step * parts + part for part in range(parts)]
        k_SH = jnp.concatenate([ref[...] for ref in k_refs])
        v_SH = jnp.concatenate(
            [_filled(v[...], filled[i]) for v, i in zip(v_refs, blocks, strict=True)]
        )
        G, Q, _ = q_ref.shape
        S = k_SH.shape[0]
        index_QS = step * S + lax.broadcasted_iota(jnp.int32, (Q, S), 1)
        seen_QS = (first_ref[...] <= index_QS) & (index_QS <= last_ref[...])

        # A loop has less code, which is compiled sooner.
        @pl.loop(0, G)
        def _(head: Any) -> None:
            scores_QS = einsum("QH,SH->QS", q_ref[head], k_SH, jnp.float32)
            scores_QS = jnp.where(seen_QS, scores_QS, _LOWEST)
            before_Q1 = max_ref[head]
            max_Q1 = jnp.maximum(before_Q1, scores_QS.max(1, keepdims=True))
            factor_Q1 = jnp.exp2((before_Q1 - max_Q1) * scale)
            weights_QS = jnp.exp2((scores_QS - max_Q1) * scale)
            total_Q1 = weights_QS.sum(1, keepdims=True)
            weights_QS = weights_QS.astype(v_SH.dtype)
            out_QH = einsum("QS,SH->QH", weights_QS, v_SH, jnp.float32)
            max_ref[head] = max_Q1
            total_ref[head] = total_ref[head] * factor_Q1 + total_Q1
            sum_ref[head] = sum_ref[head] * factor_Q1 + out_QH

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_GQH = sum_ref[...] / jnp.maximum(total_ref[...], 1e-30)
        out_ref[...] = out_GQH.astype(out_ref.dtype)


def _filled(v_OH: Array, filled: Array) -> Array:
    """Return values with 0 where no query looks: a weight of 0 leaves NaN as it is."""
    offset_O1 = lax.broadcasted_iota(jnp.int32, (v_OH.shape[0], 1), 0)
    return jnp.where(offset_O1 < filled, v_OH, jnp.zeros((), v_OH.dtype))
