"""The listed shapes that programs are compiled for; nothing else is ever run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.batch import (
    DecodeShape,
    MixedShape,
    PrefillShape,
    StepShape,
    split_decodes,
)
from disagg_jax.scheduling.interface import StepLimits
from disagg_jax.work import Slice

_TOKENS_PER_ROW = 8  # of a prefill shape: shorter prompts take the next size
_ROWS = 16  # mixed shapes have a multiple of it: similar policies share programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes in increasing order; work is padded to the next one.

    Attributes:
      prefill: one shape for each number of tokens; none where an instance never
        prefills.
      decode_rows: requests in one decode step; none where it never decodes.
      pool_blocks: lengths of the front of the KV pool that a decode step reads.
      transfer_blocks: KV blocks in one transfer.
      mixed: where prompts come in parts or beside decodes, instead of `prefill`.
    """

    prefill: tuple[PrefillShape, ...]
    decode_rows: tuple[int, ...]
    pool_blocks: tuple[int, ...]
    transfer_blocks: tuple[int, ...]
    mixed: tuple[MixedShape, ...] = ()

    @classmethod
    def for_limits(cls, limits: StepLimits, memory: KVMemory) -> Buckets:
        """Sizes up to what a policy can ask for: a few dozen programs an instance."""
        mixes = limits.mixed and limits.prefill_rows > 0
        prefills = limits.prefill_rows > 0 and not mixes
        return cls(
            prefill=_prefill_shapes(limits, memory) if prefills else (),
            mixed=_mixed_shapes(limits, memory) if mixes else (),
            decode_rows=_sizes(1, limits.decode_rows, 1.0),
            # Steps of 4: finer ones would be more programs, and a pool in full use is
            # read to its end anyway.
            pool_blocks=_sizes(16, memory.num_blocks, 1.0, factor=4)
            if limits.decode_rows
            else (),
            transfer_blocks=_sizes(1, memory.blocks_for(_longest(memory)), 1.0, 1.5),
        )

    @property
    def step_shapes(self) -> list[StepShape]:
        """Every step shape."""
        return [*self.prefill, *self.mixed, *self._decode.values()]

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """Tokens of the steps that prompts can be in, each size once."""
        shapes = self.mixed or self.prefill
        return tuple(sorted({shape.tokens for shape in shapes}))

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens of the longest prompt, or part of one, that a step can compute."""
        return self.prompt_sizes[-1]

    @functools.cached_property
    def _decode(self) -> dict[tuple[int, int], DecodeShape]:
        """One object for each shape: it remembers its layout."""
        sizes = itertools.product(self.decode_rows, self.pool_blocks)
        return {size: DecodeShape(*size) for size in sizes}

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """The smallest listed shape that holds `slices`.

        Raises:
          ValueError: if the step is larger than every bucket; or, where no mixed shapes
            are listed, if it mixes prompts and decodes or has a part of a prompt.
        """
        most = self.decode_rows[-1] if self.decode_rows else 0
        all_decode = all(part.is_decode for part in slices)
        if all_decode and (len(slices) <= most or not self.mixed):
            return self.decode_shape(len(slices), _front(slices))
        if self.mixed:
            chunks, decodes = split_decodes(slices, most)
            return self.mixed_shape(
                tokens=sum(part.count for part in slices),
                rows=len(slices),
                context=sum(len(part.blocks) for part in chunks),
                blocks=_front(decodes),
            )
        if any(part.start or not part.samples for part in slices):
            raise ValueError(
                "a step must be whole prompts or decodes only, got slices (start, "
                f"count) {[(part.start, part.count) for part in slices]}"
            )
        return self.prefill_shape(sum(part.count for part in slices), len(slices))

    def mixed_shape(
        self, *, tokens: int, rows: int, context: int, blocks: int
    ) -> MixedShape:
        for shape in self.mixed:
            if (
                shape.tokens >= tokens
                and shape.rows >= rows
                and shape.context >= context
                and shape.blocks >= blocks
            ):
                return shape
        largest = self.mixed[-1] if self.mixed else "none"
        raise ValueError(
            f"mixed: expected at most {largest}, got {tokens} tokens in {rows} rows, "
            f"{context} blocks of chunks and {blocks} of the pool"
        )

    def prefill_shape(self, tokens: int, rows: int) -> PrefillShape:
        for shape in self.prefill:
            if shape.tokens >= tokens and shape.rows >= rows:
                return shape
        largest = self.prefill[-1] if self.prefill else "none"
        raise ValueError(
            f"prefill: expected at most {largest}, got {tokens} tokens in {rows} rows"
        )

    def decode_shape(self, rows: int, blocks: int) -> DecodeShape:
        return self._decode[
            _at_least("decode rows", self.decode_rows, rows),
            _at_least("pool blocks", self.pool_blocks, blocks),
        ]

    def transfer_size(self, blocks: int) -> int:
        """The size, in blocks, for a transfer of `blocks` blocks."""
        return _at_least("transfer blocks", self.transfer_blocks, blocks)


def _prefill_shapes(limits: StepLimits, memory: KVMemory) -> tuple[PrefillShape, ...]:
    """Sizes for as many whole prompts as a policy can ask for.

    A recomputed request can be longer than any prompt, so a prefill step can hold the
    longest context whatever the policy's limit.
    """
    rows = limits.prefill_rows
    most = max(limits.prefill_tokens, _longest(memory), rows * _TOKENS_PER_ROW)
    return tuple(
        PrefillShape(tokens, min(rows, tokens // _TOKENS_PER_ROW))
        for tokens in _sizes(32, most, 1.0, 1.5)
    )


def _mixed_shapes(limits: StepLimits, memory: KVMemory) -> tuple[MixedShape, ...]:
    """Few sizes of each kind; and one shape for whatever is beyond.

    That is a step in which several long prompts go on.
    """
    longest = _longest(memory)
    every = min(limits.prefill_rows * memory.blocks_for(longest), memory.num_blocks)
    # A prompt that is not split can be as long as the longest context.
    prompt = (
        limits.prefill_tokens if limits.splits else max(limits.prefill_tokens, longest)
    )
    budget = min(prompt, every * memory.block_tokens)
    most = min(budget + limits.decode_rows, memory.num_blocks * memory.block_tokens)
    if limits.splits:  # the policy's budget includes decodes
        most = min(most, limits.prefill_tokens)
    else:  # chunks attend to their own blocks only
        every = min(every, memory.blocks_for(budget) + limits.prefill_rows)
    whole = memory.num_blocks if limits.decode_rows else 0
    sizes = [
        (tokens, min(context, every), blocks)
        for tokens in _mixed_tokens(budget, most)
        for context, blocks in _mixed_blocks(tokens, limits.splits, whole, memory)
    ]
    return tuple(
        MixedShape(
            tokens=T,
            rows=min(T, _round_up(limits.prefill_rows + limits.decode_rows, _ROWS)),
            context=C,
            decodes=min(T, limits.decode_rows),
            blocks=P,
        )
        for T, C, P in dict.fromkeys([*sizes, (most, every, whole)])
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _mixed_tokens(budget: int, most: int) -> list[int]:
    """Quarters of what a policy asks for.

    A budget that includes decodes is filled in most steps, so it is a size too, unless
    `most` is hardly more.
    """
    parts = (1, 2, 3, 4) if most > budget * 9 // 8 else (1, 2, 3)
    sizes = {budget * part // 4 for part in parts}
    return [*sorted(size for size in sizes if 32 <= size < most), most]


def _mixed_blocks(
    tokens: int, splits: bool, whole: int, memory: KVMemory
) -> list[tuple[int, int]]:
    """Sizes of a step of `tokens` tokens: blocks of its chunks, and of the pool.

    Chunks attend to their own blocks, which can be used in part; with those of a long
    request that goes on; or something between. Decodes read a quarter of the pool or
    all of it; beside the longest chunks that difference is the smaller one.
    """
    own = memory.blocks_for(tokens * 5 // 4)
    beside = own + memory.blocks_for(_longest(memory))
    between = round(math.sqrt(own * beside))
    # Odd, so that the keys are no power of 2: for 272 tokens of tiny on a CPU 31 blocks
    # took 9.6 ms, 32 14.7 and 33 10.0.
    own, between, beside = (size | 1 for size in (own, between, beside))
    fronts = (-(-whole // 4), whole)
    if not splits:
        return [(own, front) for front in fronts]
    return [*itertools.product((own, between), fronts), (beside, whole)]


def _longest(memory: KVMemory) -> int:
    """Tokens of the longest request that an instance can hold."""
    return min(memory.max_context, memory.num_blocks * memory.block_tokens)


def _front(slices: Sequence[Slice]) -> int:
    """How long a front of the pool holds what `slices` use."""
    blocks = itertools.chain.from_iterable(part.blocks for part in slices)
    return 1 + max(blocks, default=-1)


def _sizes(low: int, high: int, *steps: float, factor: int = 2) -> tuple[int, ...]:
    """low * factor**i times each of `steps`, below `high`; and `high`."""
    sizes = {high} if high else set[int]()
    size = low
    while size < high:
        sizes |= {int(size * step) for step in steps}
        size *= factor
    return tuple(sorted(size for size in sizes if size <= high))


def _at_least(what: str, sizes: Sequence[int], size: int) -> int:
    for listed in sizes:
        if listed >= size:
            return listed
    raise ValueError(f"{what}: expected at most {max(sizes, default=0)}, got {size}")
