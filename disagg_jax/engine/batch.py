"""A step's slices as one int32 vector: one copy from host to devices per step.

Shape letters as in `models/transformer.py`; also B decode rows, R prompts of a prefill
step, P blocks of the pool.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disagg_jax.engine.sampling import SamplingParams
from disagg_jax.work import Slice

_FLOATS = frozenset({"temperature", "top_p"})  # carried bit for bit in the int32 vector


@dataclasses.dataclass(frozen=True)
class Fields:
    """Named arrays that lie one after the other in a vector."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of each array in the host `vector`."""
        return {
            name: vector[start:end].view(_dtype(name)).reshape(shape)
            for name, shape, start, end in self._spans()
        }

    def unpack(self, vector: Array) -> dict[str, Array]:
        """The arrays in a traced `vector`."""
        arrays: dict[str, Array] = {}
        for name, shape, start, end in self._spans():
            part = vector[start:end].reshape(shape)
            if name in _FLOATS:
                part = jax.lax.bitcast_convert_type(part, jnp.float32)
            arrays[name] = part
        return arrays

    def _spans(self):
        start = 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            yield name, shape, start, end
            start = end


def _dtype(name: str) -> type:
    return np.float32 if name in _FLOATS else np.int32


def _sampling_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return {name: (rows,) for name in names}


def sampling_params(arrays: Mapping[str, Array]) -> SamplingParams:
    """The sampling parameters among the unpacked arrays of a batch."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return SamplingParams(**{name: arrays[name] for name in names})


def _fill_sampling(views: Mapping[str, np.ndarray], slices: Sequence[Slice]) -> None:
    n = len(slices)
    views["index"][:n] = [part.sample_index for part in slices]
    views["temperature"][n:] = 0  # padding is greedy
    if all(part.request.sampling.temperature == 0 for part in slices):
        views["temperature"][:n] = 0  # the other parameters are not looked at
        return
    for name in ("temperature", "top_k", "top_p", "seed"):
        views[name][:n] = [getattr(part.request.sampling, name) for part in slices]


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

    @property
    def fields(self) -> Fields:
        T, R = self.tokens, self.rows
        per_token = {name: (T,) for name in ("token", "position", "row", "slot")}
        return Fields({**per_token, "last": (R,), **_sampling_shapes(R)})

    def pack(
        self, slices: Sequence[Slice], block_tokens: int, scratch_block: int
    ) -> np.ndarray:
        """`[fields.size] int32`. Padding tokens are row -1 and go to the scratch block.

        `slot` is the token's place in the pool: block * block_tokens + offset.
        """
        vector = np.zeros(self.fields.size, np.int32)
        views = self.fields.views(vector)
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
        _fill_sampling(views, slices)
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

    @property
    def fields(self) -> Fields:
        B, P = self.rows, self.blocks
        per_row = {name: (B,) for name in ("token", "position", "slot")}
        per_block = {name: (P,) for name in ("owner", "start")}
        return Fields({**per_row, **per_block, **_sampling_shapes(B)})

    def pack(
        self, slices: Sequence[Slice], block_tokens: int, scratch_block: int
    ) -> np.ndarray:
        """`[fields.size] int32`. Padding rows own no block, and write to scratch."""
        vector = np.zeros(self.fields.size, np.int32)
        views = self.fields.views(vector)
        n = len(slices)
        position = np.array([part.start for part in slices], np.int32)
        counts = np.array([len(part.blocks) for part in slices])
        block = np.fromiter(
            itertools.chain.from_iterable(part.blocks for part in slices), np.int32
        )
        ends = counts.cumsum()
        first = np.repeat(ends - counts, counts)  # where each one's row begins
        views["token"][:n] = [part.tokens[0] for part in slices]
        views["position"][:n] = position
        newest = block[ends - counts + position // block_tokens]
        views["slot"][:n] = newest * block_tokens + position % block_tokens
        views["slot"][n:] = scratch_block * block_tokens
        views["owner"][:] = -1
        views["owner"][block] = np.repeat(np.arange(n), counts)
        views["start"][block] = (np.arange(len(block)) - first) * block_tokens
        _fill_sampling(views, slices)
        return vector


StepShape = PrefillShape | DecodeShape
