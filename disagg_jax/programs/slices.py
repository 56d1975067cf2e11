"""Slices that need a given shape, or have a given load: work to time and to price."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from disagg_jax.deployment import KVMemory
from disagg_jax.programs.buckets import Buckets
from disagg_jax.programs.shapes import StepShape
from disagg_jax.request import Request
from disagg_jax.work import Slice, StepLoad


def typical_slices(
    shape: StepShape, buckets: Buckets, memory: KVMemory
) -> tuple[Slice, ...]:
    """Return `full_slices`, but decodes that use only half of the shape's blocks.

    The slices of a decode program change what it takes: 16 rows over 256 blocks took
    6 % less (m32; tiny 17 %) on a CPU with 100 blocks in use than with all, perhaps
    since masked scores skip their exponentials. Sizes are steps of 4, so half is the
    middle.
    """
    if shape.kind != "decode":
        return full_slices(shape, memory)
    smaller = [size for size in buckets.pool_blocks if size < shape.blocks]
    least = max(smaller, default=0) + 1
    blocks = max(least, min(shape.rows, shape.blocks), shape.blocks // 2)
    return _full_decodes(shape.rows, blocks, memory)


def full_slices(shape: StepShape, memory: KVMemory) -> tuple[Slice, ...]:
    """Return slices that fill `shape` and need it; rows may share blocks."""
    if shape.kind == "decode":
        return _full_decodes(shape.rows, shape.blocks, memory)
    if shape.kind == "prefill":
        parts = np.array_split(np.arange(shape.tokens), min(shape.rows, shape.tokens))
        counts = [len(part) for part in parts]
        return tuple(_slice(0, n, range(memory.blocks_for(n))) for n in counts)
    context = shape.context * memory.block_tokens
    count = max(shape.tokens - shape.decodes, min(shape.tokens // 2, context))
    chunk = _slice(context - count, count, range(shape.context))
    return (chunk, *_full_decodes(shape.tokens - count, shape.blocks, memory))


def load_slices(load: StepLoad, memory: KVMemory) -> tuple[Slice, ...]:
    """Return slices of a step with this load, its decodes all alike."""
    parts = list(load.chunks)
    if load.decodes:
        # Alike, they may need more blocks than there are: then as much as fits.
        fitting = memory.num_blocks // load.decodes * memory.block_tokens
        each = min(load.context // load.decodes, fitting)
        parts += [(max(1, each - 1), 1)] * load.decodes
    return slices_of(parts, memory)


def slices_of(parts: Iterable[tuple[int, int]], memory: KVMemory) -> tuple[Slice, ...]:
    """Return slices of these (start, count), their blocks in a row in the pool.

    Where the pool is too short they share its last blocks.
    """
    slices: list[Slice] = []
    first = 0
    for start, count in parts:
        blocks = memory.blocks_for(start + count)
        first = max(0, min(first, memory.num_blocks - blocks))
        slices.append(_slice(start, count, range(first, first + blocks)))
        first += blocks
    return tuple(slices)


def _full_decodes(rows: int, blocks: int, memory: KVMemory) -> tuple[Slice, ...]:
    """Return decodes that have the pool's first `blocks` blocks, all full.

    They are as many as `rows`, or as there are blocks if these are fewer.
    """
    rows = min(rows, blocks)
    tables = np.array_split(np.arange(blocks), rows) if rows else []
    return tuple(
        _slice(len(table) * memory.block_tokens - 1, 1, table.tolist())
        for table in tables
    )


def _slice(start: int, count: int, blocks: Iterable[int]) -> Slice:
    return Slice(
        request=Request(id=0, arrival_s=0, prompt_tokens=start + 1, max_tokens=1),
        start=start,
        count=count,
        samples=True,
        blocks=tuple(blocks),
        tokens=(0,) * count,
    )
