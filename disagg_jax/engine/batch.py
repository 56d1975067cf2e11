"""A step's slices as one int32 vector: one copy from host to devices per step.

Shape letters as in `models/transformer.py`; also B decode rows, R prompts of a prefill
step, P blocks of the pool.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

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

    tokens: int  # T: prompt tokens of all rows together
    rows: int  # R: prompts

    def __str__(self) -> str:
        return f"prefill_T{self.tokens}_R{self.rows}"

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
        start = 0
        for row, part in enumerate(slices):
            end = start + part.count
            positions = np.arange(part.count, dtype=np.int32)
            blocks = np.array(part.blocks, np.int32)
            views["token"][start:end] = part.tokens
            views["position"][start:end] = positions
            views["row"][start:end] = row
            views["slot"][start:end] = (
                blocks[positions // block_tokens] * block_tokens
                + positions % block_tokens
            )
            views["last"][row] = end - 1
            start = end
        return vector


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """A decode program's shape: one token for each row, over the front of the pool."""

    rows: int  # B
    blocks: int  # P: blocks of the pool that are read

    def __str__(self) -> str:
        return f"decode_B{self.rows}_P{self.blocks}"

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
        newest, offset = np.divmod(position, block_tokens)
        views["token"][:n] = [part.tokens[0] for part in slices]
        views["position"][:n] = position
        views["slot"][:n] = block[firsts + newest] * block_tokens + offset
        views["slot"][n:] = scratch_block * block_tokens
        return vector


StepShape = PrefillShape | DecodeShape
