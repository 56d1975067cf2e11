"""A step's slices as one int32 vector: one copy from host to devices per step.

Shape letters as in `models/transformer.py`; also R rows that get logits, B decodes, P
blocks that decodes attend to, C blocks that chunks attend to, W blocks that prompts
write, O offsets in a block.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from jax import Array

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention.entries import UNSEEN
from disagg_jax.programs.shapes import StepShape, split_decodes
from disagg_jax.work import Slice

Vector = TypeVar("Vector", np.ndarray, Array)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Named int32 arrays that lie one after the other in a vector."""

    lengths: Mapping[str, int]

    @functools.cached_property
    def size(self) -> int:
        return sum(self.lengths.values())

    @functools.cached_property
    def _places(self) -> list[tuple[str, slice]]:
        ends = itertools.accumulate(self.lengths.values(), initial=0)
        return [
            (name, slice(*bounds))
            for name, bounds in zip(self.lengths, itertools.pairwise(ends), strict=True)
        ]

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Return the arrays in `vector`: parts of a traced one, views of a host one."""
        return {name: vector[place] for name, place in self._places}


@functools.cache
def fields_of(shape: StepShape, block_tokens: int) -> Fields:
    """Return what the vector of a step of `shape` consists of.

    A token's `row` is the prompt, or chunk, that it belongs to. `last` is each row's
    last token. Prompts write whole blocks: `write_token` is, for each offset of each
    `write_block`, the token of the step that goes there, or -1. A decode writes to its
    `slot` in the pool: block * block_tokens + offset. `owner` and `start` of a `block`
    are the decode that attends to it and its first token's position in the request
    (`Entries`); `chunk_owner` and `chunk_start` say it of `chunk_block`.
    """
    _, T, R, C, B, P = shape
    W = _most_written(shape, block_tokens)
    tokens = dict.fromkeys(("token", "position", "row"), T)
    writes = {"write_block": W, "write_token": W * block_tokens}
    decodes = {"slot": B, **dict.fromkeys(("block", "owner", "start"), P)}
    match shape.kind:
        case "prefill":
            return Fields({**tokens, **writes, "last": R})
        case "decode":
            return Fields({"token": B, "position": B, **decodes})
        case _:
            chunks = dict.fromkeys(("chunk_block", "chunk_owner", "chunk_start"), C)
            return Fields({**tokens, **writes, "last": R, **chunks, **decodes})


def _most_written(shape: StepShape, block_tokens: int) -> int:
    """Return the most blocks that prompts, or chunks, of a step of `shape` write."""
    T, R = shape.tokens, min(shape.rows, shape.tokens)
    if shape.kind == "prefill":  # each prompt begins with its first block
        return R + (T - R) // block_tokens
    return min(shape.context, T, T // block_tokens + 2 * R)


def pack(shape: StepShape, slices: Sequence[Slice], memory: KVMemory) -> np.ndarray:
    """Return the fields of `shape` as `int32`, `slices` as the program takes them.

    Decodes come first, so that their queries are a fixed slice of the batch; chunks
    follow at once, so that neither is padded apart from the other. Padding goes to the
    scratch block after the pool; the last decode has it, and does not see it. The `row`
    of padding and of decodes is -1.
    """
    block_tokens, scratch_block = memory.block_tokens, memory.num_blocks
    fields = fields_of(shape, block_tokens)
    vector = np.zeros(fields.size, np.int32)
    views = fields.split(vector)
    chunks, decodes = split_decodes(slices, shape.decodes)
    if "slot" in views:
        views["slot"][:] = scratch_block * block_tokens
        views["block"][:] = scratch_block
        views["start"][:] = UNSEEN
        if decodes:
            _pack_decodes(views, decodes, block_tokens)
    if "row" in views:
        views["row"][:] = -1
        views["write_block"][:] = scratch_block
        views["write_token"][:] = -1
        lasts = _pack_chunks(views, chunks, block_tokens, first=len(decodes))
        views["last"][: len(slices)] = [*lasts, *range(len(decodes))]
    if "chunk_block" in views:
        _pack_tables(views, chunks, block_tokens, scratch_block)
    return vector


def _pack_chunks(
    views: Mapping[str, np.ndarray],
    slices: Sequence[Slice],
    block_tokens: int,
    first: int,
) -> list[int]:
    """Write chunks one after the other from token `first` on.

    Returns:
      The last token of each chunk.
    """
    lasts: list[int] = []
    written = 0
    for row, part in enumerate(slices):
        end = first + part.count
        views["token"][first:end] = part.tokens
        views["position"][first:end] = np.arange(part.start, part.start + part.count)
        views["row"][first:end] = row
        skipped, offset = divmod(part.start, block_tokens)
        blocks = part.blocks[skipped:]
        views["write_block"][written : written + len(blocks)] = blocks
        slot = written * block_tokens + offset
        views["write_token"][slot : slot + part.count] = np.arange(first, end)
        written += len(blocks)
        lasts.append(end - 1)
        first = end
    return lasts


def _pack_tables(
    views: Mapping[str, np.ndarray],
    chunks: Sequence[Slice],
    block_tokens: int,
    scratch_block: int,
) -> None:
    """Write the blocks that chunks attend to."""
    views["chunk_block"][:] = scratch_block
    views["chunk_owner"][:] = -1
    counts = [len(part.blocks) for part in chunks]
    n = sum(counts)
    views["chunk_block"][:n] = [block for part in chunks for block in part.blocks]
    views["chunk_owner"][:n] = np.repeat(np.arange(len(chunks)), counts)
    views["chunk_start"][:n] = [
        i * block_tokens for count in counts for i in range(count)
    ]


def _pack_decodes(
    views: Mapping[str, np.ndarray], slices: Sequence[Slice], block_tokens: int
) -> None:
    """Write decodes as the first tokens, and the blocks that they attend to."""
    n = len(slices)
    tables = [part.blocks for part in slices]
    counts = np.array([len(table) for table in tables])
    ends = counts.cumsum()
    firsts = ends - counts  # where each table begins in `block`
    block = np.fromiter(itertools.chain.from_iterable(tables), np.int32)
    entries = len(block)
    owner = np.repeat(np.arange(n), counts)
    views["block"][:entries] = block
    views["owner"][:entries] = owner
    views["owner"][entries:] = n - 1
    views["start"][:entries] = (np.arange(entries) - firsts[owner]) * block_tokens
    position = np.array([part.start for part in slices])
    views["token"][:n] = [part.tokens[0] for part in slices]
    views["position"][:n] = position
    # The last block holds the token's own KV.
    views["slot"][:n] = block[ends - 1] * block_tokens + position % block_tokens
