"""Attention of decodes on a TPU, as a Pallas kernel.

The kernel goes over the list of entries, several in a step. The pipeline
of Pallas brings their blocks from the pool to VMEM while the step before computes, by a
list that it can read ahead (prefetched scalars): KV is read once and gathered nowhere.
Queries and outputs of all rows stay in VMEM, and so does the running softmax of the row
at hand.

Scores, weights and sums are float32. Products of float32 are exact (HIGHEST); those of
bfloat16 have bfloat16 operands, the weights of values rounded to it.

Shape letters as in `models/transformer.py`; also B decode rows, P entries, E entries of
a step, G query heads of a kv head, O offsets in a block.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kv_cache import IN_BOUNDS, LayerCache
from models.layers import einsum

# K and V that a step reads. What comes from HBM is late by about what 1 MiB takes to
# read, and a step has its overhead. Compiled for a v6e, an entry of Llama-3-8B with 128
# tokens takes 657, 585 and 540 bundles of instructions with 1, 2 and 4 in a step; to
# read it takes 560 cycles.
_STEP_BYTES = 2**21
_MOST_ENTRIES = 8  # of a step, whose code grows with them
_SPARE_BYTES = 2**23  # of VMEM, for what a step computes
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Softmax(NamedTuple):
    """The softmax of the heads of a row over some of its keys."""

    max_N1: Array  # highest score
    total_N1: Array  # of weights, which are relative to the highest score
    out_NH: Array  # sum of weighted values


def decode_attention(
    q_BNH: Array,
    layer: LayerCache,
    position_B: Array,
    entries: Entries,
    *,
    interpret: bool,
) -> Array:
    """Attend from one query a row to the blocks of its entries.

    It means what `paged.paged_attention` does. Padding costs nothing but empty steps:
    its blocks are the scratch block, which is read once, as long as it stays the same.

    Args:
      interpret: whether to run without a TPU.
    """
    B, N, H = q_BNH.shape
    k, v = layer
    _, O, cache_H = block = k.shape[1:]  # noqa: E741
    block_bytes = 2 * math.prod(block) * k.dtype.itemsize
    most = min(_MOST_ENTRIES, entries.owner_P.shape[0])
    E = max(1, min(most, _STEP_BYTES // block_bytes))
    scalars = _scalars(position_B, entries, O, E)
    P = scalars[0].shape[0]
    rows = pl.BlockSpec((B, N, cache_H), lambda i, *_: (0, 0, 0))
    blocks = [
        pl.BlockSpec((None, *block), functools.partial(_block_index, e, E))
        for e in range(E)
    ]
    q_BNH = jnp.pad(q_BNH, ((0, 0), (0, 0), (0, cache_H - H)))
    rows_bytes = 2 * q_BNH.size * q_BNH.dtype.itemsize
    out_BNH = pl.pallas_call(
        functools.partial(_kernel, entries=E, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(P // E,),
            in_specs=[rows, *blocks, *blocks],
            out_specs=rows,
            scratch_shapes=[
                pltpu.VMEM((N, width), jnp.float32) for width in (1, 1, cache_H)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BNH.shape, q_BNH.dtype),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=2 * (rows_bytes + E * block_bytes) + _SPARE_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * P * O * N * cache_H,
            transcendentals=P * O * N,
            bytes_accessed=P * block_bytes + rows_bytes,
        ),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, q_BNH, *[k] * E, *[v] * E)
    return out_BNH[..., :H]


def _scalars(
    position_B: Array, entries: Entries, block_tokens: int, multiple: int
) -> list[Array]:
    """Return what the kernel reads of each entry: `int32` arrays of a length.

    Returns:
      Its block, its row, whether its row begins with it, and how many of its tokens
      the row sees.
    """
    block_P, owner_P, start_P = entries
    position_P = position_B.at[owner_P].get(mode=IN_BOUNDS)
    seen_P = jnp.clip(position_P - start_P + 1, 0, block_tokens)
    begins_P = jnp.diff(owner_P, prepend=-1)
    more = (0, -len(block_P) % multiple)
    same = [jnp.pad(x, more, "edge") for x in (block_P, owner_P)]
    return [*same, *(jnp.pad(x, more) for x in (begins_P, seen_P))]


def _block_index(
    entry: int, entries: int, step: Any, block: Any, *_: Any
) -> tuple[Any, ...]:
    """Return where a block of a step is in the pool."""
    return (block[step * entries + entry], 0, 0, 0)


def _kernel(
    _: Any,
    owner: Any,
    begins: Any,
    seen: Any,
    q_ref: Any,
    *refs: Any,
    entries: int,
    scale: float,
) -> None:
    """Attend with the entries of a step."""
    k_refs, v_refs = refs[:entries], refs[entries : 2 * entries]
    out_ref, *found_refs = refs[2 * entries :]
    first = pl.program_id(0) * entries

    @pl.when(first == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(seen[first] > 0)  # otherwise there is padding from here on
    def _() -> None:
        ids = [first + e for e in range(entries)]
        # All apart from each other at first, so that one can wait for another's MXU.
        parts = [
            _attend(q_ref[owner[id]], k[...], v[...], seen[id], scale)
            for id, k, v in zip(ids, k_refs, v_refs, strict=True)
        ]
        found = _Softmax(*(ref[...] for ref in found_refs))
        for id, part in zip(ids, parts, strict=True):
            found = _joined(found, part, begins[id] > 0)
            out_NH = found.out_NH / jnp.maximum(found.total_N1, 1e-30)
            out_ref[owner[id]] = out_NH.astype(out_ref.dtype)
        for ref, x in zip(found_refs, found, strict=True):
            ref[...] = x


def _attend(
    q_NH: Array, k_KOH: Array, v_KOH: Array, seen: Array, scale: float
) -> _Softmax:
    """Return the softmax of a row over the first `seen` tokens of a block."""
    N, H = q_NH.shape
    K, O, _ = k_KOH.shape  # noqa: E741
    # Rows of float32 can be cut anywhere, those of bfloat16 lie in pairs.
    q_KGH = q_NH.astype(jnp.float32).reshape(K, N // K, H).astype(k_KOH.dtype)
    scores_KGO = einsum("KGH,KOH->KGO", q_KGH, k_KOH, jnp.float32) * scale
    seen_1O = lax.broadcasted_iota(jnp.int32, (1, O), 1) < seen
    seen_1O1 = lax.broadcasted_iota(jnp.int32, (1, O, 1), 1) < seen
    scores_NO = jnp.where(seen_1O, scores_KGO.reshape(N, O), _LOWEST)
    max_N1 = scores_NO.max(1, keepdims=True)
    weights_NO = jnp.where(seen_1O, jnp.exp(scores_NO - max_N1), 0.0)
    weights_KGO = weights_NO.reshape(K, N // K, O).astype(v_KOH.dtype)
    # A weight of 0 alone would not do: 0 * NaN is NaN.
    v_KOH = jnp.where(seen_1O1, v_KOH, jnp.zeros((), v_KOH.dtype))
    out_KGH = einsum("KGO,KOH->KGH", weights_KGO, v_KOH, jnp.float32)
    total_N1 = weights_NO.sum(1, keepdims=True)
    return _Softmax(max_N1, total_N1, out_KGH.reshape(N, H))


def _joined(found: _Softmax, part: _Softmax, begins: Array) -> _Softmax:
    """Return the softmax over the keys of both; of `part` alone if its row begins."""
    # A factor of 0 would not do: what the row before left may be NaN.
    empty = _LOWEST, 0.0, 0.0
    found = _Softmax(
        *(jnp.where(begins, x, y) for x, y in zip(empty, found, strict=True))
    )
    max_N1 = jnp.maximum(found.max_N1, part.max_N1)
    before_N1, now_N1 = jnp.exp(found.max_N1 - max_N1), jnp.exp(part.max_N1 - max_N1)
    return _Softmax(
        max_N1,
        found.total_N1 * before_N1 + part.total_N1 * now_N1,
        found.out_NH * before_N1 + part.out_NH * now_N1,
    )
