"""A step's slices as one int32 vector: one copy from host to devices per step.

Shape letters as in `models/transformer.py`; also R rows that get logits, B decodes, P
blocks of the pool's front, C blocks that chunks attend to.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
from jax import Array

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
        """The arrays in `vector`: parts of a traced one, views of a host one."""
        return {name: vector[place] for name, place in self._places}


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """A prefill program's shape: whole prompts, one after the other."""

    kind: ClassVar[str] = "prefill"
    tokens: int  # T: prompt tokens of all rows together
    rows: int  # R: prompts

    def __str__(self) -> str:
        return f"{self.kind}_T{self.tokens}_R{self.rows}"

    @property
    def width(self) -> int:
        """Tokens that go through the layers, padding included."""
        return self.tokens

    @functools.cached_property
    def fields(self) -> Fields:
        T, R = self.tokens, self.rows
        return Fields({"token": T, "position": T, "row": T, "slot": T, "last": R})

    def pack(
        self, slices: Sequence[Slice], block_tokens: int, scratch_block: int
    ) -> np.ndarray:
        """`[fields.size] int32`. Padding tokens are row -1 and go to the scratch block.

        `slot` is the token's place in the pool: block * block_tokens + offset.
        """
        vector = np.zeros(self.fields.size, np.int32)
        views = self.fields.split(vector)
        views["row"][:] = -1
        views["slot"][:] = scratch_block * block_tokens
        views["last"][: len(slices)] = _pack_chunks(views, slices, block_tokens)
        return vector


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """A decode program's shape: one token for each row, over the front of the pool."""

    kind: ClassVar[str] = "decode"
    rows: int  # B
    blocks: int  # P: blocks of the pool that are read

    def __str__(self) -> str:
        return f"{self.kind}_B{self.rows}_P{self.blocks}"

    @property
    def width(self) -> int:
        """Tokens that go through the layers, padding included."""
        return self.rows

    @functools.cached_property
    def fields(self) -> Fields:
        B, P = self.rows, self.blocks
        return Fields({"token": B, "position": B, "slot": B, "owner": P, "start": P})

    def pack(
        self, slices: Sequence[Slice], block_tokens: int, scratch_block: int
    ) -> np.ndarray:
        """`[fields.size] int32`. Padding rows own no block, and write to scratch."""
        vector = np.zeros(self.fields.size, np.int32)
        views = self.fields.split(vector)
        _pack_decodes(views, slices, block_tokens)
        views["slot"][len(slices) :] = scratch_block * block_tokens
        return vector


@dataclasses.dataclass(frozen=True)
class MixedShape:
    """A mixed program's shape: chunks of prompts, and decodes, as one batch of tokens.

    Decodes come first, so that their queries are a fixed slice of the batch; chunks
    follow at once, so that neither is padded apart from the other.
    """

    kind: ClassVar[str] = "mixed"
    tokens: int  # T: of chunks and decodes together
    rows: int  # R: chunks and decodes
    context: int  # C: KV blocks of all chunks together, that is their prompts so far
    decodes: int  # B: the first tokens, which may be decodes
    blocks: int  # P: blocks of the pool that decodes read

    def __str__(self) -> str:
        return f"{self.kind}_T{self.tokens}_C{self.context}_P{self.blocks}"

    @property
    def width(self) -> int:
        """Tokens that go through the layers, padding included."""
        return self.tokens

    @functools.cached_property
    def fields(self) -> Fields:
        T, C, P = self.tokens, self.context, self.blocks
        tokens = dict.fromkeys(("token", "position", "row", "slot"), T)
        chunks = dict.fromkeys(("chunk_block", "chunk_owner", "chunk_start"), C)
        return Fields({**tokens, "last": self.rows, **chunks, "owner": P, "start": P})

    def pack(
        self, slices: Sequence[Slice], block_tokens: int, scratch_block: int
    ) -> np.ndarray:
        """`[fields.size] int32`. Padding goes to the scratch block and is row -1.

        Decodes are row -1 too: `row` is the chunk that a token belongs to.
        """
        vector = np.zeros(self.fields.size, np.int32)
        views = self.fields.split(vector)
        views["row"][:] = -1
        views["slot"][:] = scratch_block * block_tokens
        views["chunk_block"][:] = scratch_block
        views["chunk_owner"][:] = -1
        chunks, decodes = split_decodes(slices, self.decodes)
        if decodes:
            _pack_decodes(views, decodes, block_tokens)
        else:
            views["owner"][:] = -1
        lasts = _pack_chunks(views, chunks, block_tokens, first=len(decodes))
        views["last"][: len(slices)] = [*lasts, *range(len(decodes))]
        tables = [part.blocks for part in chunks]
        block = list(itertools.chain.from_iterable(tables))
        counts = [len(table) for table in tables]
        views["chunk_block"][: len(block)] = block
        views["chunk_owner"][: len(block)] = np.repeat(np.arange(len(chunks)), counts)
        views["chunk_start"][: len(block)] = [
            i * block_tokens for count in counts for i in range(count)
        ]
        return vector


StepShape = PrefillShape | DecodeShape | MixedShape
"""The listed shapes that programs are compiled for; nothing else is ever run."""


def split_decodes(
    slices: Sequence[Slice], most: int
) -> tuple[Sequence[Slice], Sequence[Slice]]:
    """A mixed step's chunks and its decodes: the last slices, but `most` at most.

    The last token of a chunked prompt may be counted with the decodes: it is the same
    computation.
    """
    i = len(slices)
    while i > max(0, len(slices) - most) and slices[i - 1].is_decode:
        i -= 1
    return slices[:i], slices[i:]


def _pack_chunks(
    views: Mapping[str, np.ndarray],
    slices: Sequence[Slice],
    block_tokens: int,
    first: int = 0,
) -> list[int]:
    """Writes chunks one after the other from token `first` on.

    Returns:
      Which token is the last of each chunk.
    """
    lasts: list[int] = []
    for row, part in enumerate(slices):
        end = first + part.count
        positions = np.arange(part.start, part.start + part.count)
        block, offset = np.divmod(positions, block_tokens)
        views["token"][first:end] = part.tokens
        views["position"][first:end] = positions
        views["row"][first:end] = row
        views["slot"][first:end] = np.array(part.blocks)[block] * block_tokens + offset
        lasts.append(end - 1)
        first = end
    return lasts


def _pack_decodes(
    views: Mapping[str, np.ndarray], slices: Sequence[Slice], block_tokens: int
) -> None:
    """Writes decodes as the first tokens, and who owns which block of the front."""
    n = len(slices)
    tables = [part.blocks for part in slices]
    counts = np.array([len(table) for table in tables])
    ends = counts.cumsum()
    firsts = ends - counts  # where each one's table begins in `block`
    # intp, as all that numpy indexes with: anything else is converted first.
    block = np.fromiter(itertools.chain.from_iterable(tables), np.intp)
    row = np.repeat(np.arange(n), counts)
    views["owner"][:] = -1
    views["owner"][block] = row
    views["start"][block] = (np.arange(len(block)) - firsts[row]) * block_tokens
    position = np.array([part.start for part in slices])
    views["token"][:n] = [part.tokens[0] for part in slices]
    views["position"][:n] = position
    # The last block holds the token's own KV.
    views["slot"][:n] = block[ends - 1] * block_tokens + position % block_tokens
