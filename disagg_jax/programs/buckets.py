"""The shapes that one instance has programs for, and the one rule that rounds to them.

An engine pads each step to the smallest listed shape that holds it. A step then takes
what its program takes, however full it is, so a cost model of that engine must round as
the engine does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from disagg_jax.deployment import KVMemory
from disagg_jax.programs.shapes import StepShape, split_decodes
from disagg_jax.scheduling.interface import StepLimits
from disagg_jax.work import Slice, StepLoad, last_tokens

_TOKENS_PER_ROW = 8  # of a prefill shape: shorter prompts take the next size
_ROWS = 16  # mixed shapes have a multiple of it: similar policies share programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes in increasing order; work is padded to the first one that holds it.

    Attributes:
      prefill: one shape for each number of tokens; none where an instance never
        prefills.
      decode_rows: requests in one decode step; none where it never decodes.
      pool_blocks: KV blocks that a decode step attends to, of all its requests.
      transfer_blocks: KV blocks in one transfer.
      mixed: where prompts come in parts or beside decodes, instead of `prefill`.
    """

    prefill: tuple[StepShape, ...]
    decode_rows: tuple[int, ...]
    pool_blocks: tuple[int, ...]
    transfer_blocks: tuple[int, ...]
    mixed: tuple[StepShape, ...] = ()

    @classmethod
    def for_limits(cls, limits: StepLimits, memory: KVMemory) -> Buckets:
        """List sizes up to what a policy can ask for: a few dozen an instance."""
        # Each decode has a block at least.
        rows = min(limits.decode_rows, memory.num_blocks)
        limits = dataclasses.replace(limits, decode_rows=rows)
        mixes = limits.mixed and limits.prefill_rows > 0
        prefills = limits.prefill_rows > 0 and not mixes
        return cls(
            prefill=_prefill_shapes(limits, memory) if prefills else (),
            mixed=_mixed_shapes(limits, memory) if mixes else (),
            decode_rows=_sizes(1, limits.decode_rows, 1.0),
            # Steps of 4: finer ones would be more programs.
            pool_blocks=_sizes(16, memory.num_blocks, 1.0, factor=4)
            if limits.decode_rows
            else (),
            transfer_blocks=_sizes(1, memory.blocks_for(_longest(memory)), 1.0, 1.5),
        )

    @functools.cached_property
    def decode(self) -> tuple[StepShape, ...]:
        """Return the decode shapes: pairs of `decode_rows` and `pool_blocks`.

        Each request attends to a block at least, so that a step of more rows than the
        next smaller size has more blocks than that.
        """
        fewer = (0, *self.decode_rows)
        return tuple(
            StepShape.decode(rows, blocks)
            for less, rows in zip(fewer, self.decode_rows, strict=False)
            for blocks in self.pool_blocks
            if blocks > less
        )

    @property
    def step_shapes(self) -> tuple[StepShape, ...]:
        """Every step shape."""
        return (*self.prefill, *self.mixed, *self.decode)

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """Tokens of the steps that prompts can be in, each size once."""
        shapes = self.mixed or self.prefill
        return tuple(sorted({shape.tokens for shape in shapes}))

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens of the longest prompt, or part of one, that a step can compute."""
        return self.prompt_sizes[-1]

    @property
    def most_decodes(self) -> int:
        """Requests in the largest decode step."""
        return self.decode_rows[-1] if self.decode_rows else 0

    # -- rounding ------------------------------------------------------------------

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """Return the shape of a step of `slices`, whose blocks are known.

        Raises:
          ValueError: if the step is larger than every listed shape; or, where no mixed
            shapes are listed, if it mixes prompts and decodes or has a part of a
            prompt.
        """
        most = self.most_decodes if self.mixed else len(slices)
        chunks, decodes = split_decodes(slices, most)
        if chunks and not self.mixed:
            if any(part.start or not part.samples for part in slices):
                raise ValueError(
                    "a step must be whole prompts or decodes only, got slices (start, "
                    f"count) {[(part.start, part.count) for part in slices]}"
                )
        return self._first(
            tokens=sum([part.count for part in slices]),
            rows=len(slices),
            context=sum([len(part.blocks) for part in chunks]),
            decodes=len(decodes),
            blocks=sum([len(part.blocks) for part in decodes]),
        )

    def load_shape(self, load: StepLoad, block_tokens: int) -> StepShape:
        """Return the shape of a step of which only the load is known.

        A load tells how much context its decodes have, but mostly not in how many
        blocks; see `guess_blocks`. Decodes beyond `most_decodes` count as chunks of the
        mean context.

        Raises:
          ValueError: if the step is larger than every listed shape.
        """
        chunks, decodes, context = load.chunks, load.decodes, load.context
        blocks, known = load.decode_blocks, load.decode_blocks > 0 or not decodes
        most = self.most_decodes if self.mixed else decodes
        if self.mixed and (last := last_tokens(chunks, most - decodes)):
            context += sum([start + 1 for start, _ in chunks[-last:]])
            blocks += sum([start // block_tokens + 1 for start, _ in chunks[-last:]])
            chunks, decodes = chunks[:-last], decodes + last
        extra = max(0, decodes - most)
        placed, each = decodes - extra, context / decodes if decodes else 0.0
        ends = [start + n for start, n in chunks] + [math.ceil(each)] * extra
        if extra or not known:
            blocks = self.guess_blocks(placed, round(each * placed), block_tokens)
        return self._first(
            tokens=sum([n for _, n in chunks]) + decodes,
            rows=len(chunks) + decodes,
            context=sum([-(-end // block_tokens) for end in ends]),
            decodes=placed,
            blocks=blocks,
        )

    def _first(
        self, *, tokens: int, rows: int, context: int, decodes: int, blocks: int
    ) -> StepShape:
        """Return the first listed shape that holds a step of these sizes."""
        if decodes == rows:
            listed, needed = self.decode, StepShape.decode(rows, blocks)
        elif self.mixed:
            listed = self.mixed
            needed = StepShape("mixed", tokens, rows, context, decodes, blocks)
        else:  # no KV of before is read
            listed, needed = self.prefill, StepShape.prefill(tokens, rows)
        _, tokens, rows, context, _, blocks = needed
        for shape in listed:
            if (
                shape.tokens >= tokens
                and shape.rows >= rows
                and shape.context >= context
                and shape.blocks >= blocks
            ):
                return shape
        largest = repr(listed[-1]) if listed else "none"
        raise ValueError(f"{needed.kind}: expected at most {largest}, got {needed!r}")

    def guess_blocks(self, decodes: int, context: int, block_tokens: int) -> int:
        """Return the KV blocks that hold `context` tokens of `decodes` requests.

        Each request's last block is taken to be half full. It is never more than the
        largest listed number.
        """
        tokens = context + decodes * _spare_tokens(block_tokens)
        return min(math.ceil(tokens / block_tokens), self._most_blocks)

    @functools.cached_property
    def _most_blocks(self) -> int:
        """Return the most KV blocks that decodes attend to in a listed program."""
        return max([shape.blocks for shape in self.step_shapes], default=0)

    def transfer_size(self, blocks: int) -> int:
        """Return the blocks that a transfer of `blocks` blocks is padded to.

        Raises:
          ValueError: if the transfer is larger than every listed size.
        """
        for size in self.transfer_blocks:
            if size >= blocks:
                return size
        most = max(self.transfer_blocks, default=0)
        raise ValueError(f"transfer blocks: expected at most {most}, got {blocks}")


def most_context(decodes: int, blocks: int, block_tokens: int) -> int:
    """Return the most context for which `Buckets.guess_blocks` says `blocks`."""
    return math.floor(blocks * block_tokens - decodes * _spare_tokens(block_tokens))


def exact_shape(load: StepLoad, block_tokens: int, *, mixed: bool) -> StepShape:
    """Return the shape that holds a step and no more, which no list need have.

    Args:
      mixed: whether a step of prompts alone is a mixed one.
    """
    chunks, decodes = load.chunks, load.decodes
    spare = decodes * _spare_tokens(block_tokens)
    blocks = load.decode_blocks or math.ceil((load.context + spare) / block_tokens)
    if not chunks:
        return StepShape.decode(decodes, blocks)
    tokens, rows = load.prompt_tokens + decodes, len(chunks) + decodes
    if not (mixed or decodes):
        return StepShape.prefill(tokens, rows)
    context = sum(-(-(start + n) // block_tokens) for start, n in chunks)
    return StepShape.mixed(tokens, rows, context, decodes, blocks)


def _spare_tokens(block_tokens: int) -> float:
    """Return the tokens that a request's last block has room for, on average."""
    return (block_tokens - 1) / 2


def _prefill_shapes(limits: StepLimits, memory: KVMemory) -> tuple[StepShape, ...]:
    """Return sizes for as many whole prompts as a policy can ask for.

    A recomputed request can be longer than any prompt, so a prefill step can hold the
    longest context whatever the policy's limit.
    """
    rows = limits.prefill_rows
    most = max(limits.prefill_tokens, _longest(memory), rows * _TOKENS_PER_ROW)
    return tuple(
        StepShape.prefill(tokens, min(rows, tokens // _TOKENS_PER_ROW))
        for tokens in _sizes(32, most, 1.0, 1.5)
    )


def _mixed_shapes(limits: StepLimits, memory: KVMemory) -> tuple[StepShape, ...]:
    """Return a few sizes, and one shape for all larger steps.

    A larger step is one in which several long prompts go on.
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
    rows = -(-(limits.prefill_rows + limits.decode_rows) // _ROWS) * _ROWS
    sizes = [
        (tokens, min(context, every), blocks)
        for tokens in _mixed_tokens(budget, most)
        for context, blocks in _mixed_blocks(tokens, limits, memory)
    ]
    return tuple(
        StepShape.mixed(
            tokens=T,
            rows=min(T, rows),
            context=C,
            decodes=min(T, limits.decode_rows),
            blocks=P,
        )
        for T, C, P in dict.fromkeys([*sizes, (most, every, whole)])
    )


def _mixed_tokens(budget: int, most: int) -> list[int]:
    """Return quarters of a policy's budget, and `most`.

    Most steps fill a budget that includes decodes, so the budget is a size too, unless
    `most` is hardly larger.
    """
    parts = (1, 2, 3, 4) if most > budget * 9 // 8 else (1, 2, 3)
    sizes = {budget * part // 4 for part in parts}
    return [*sorted(size for size in sizes if 32 <= size < most), most]


def _mixed_blocks(
    tokens: int, limits: StepLimits, memory: KVMemory
) -> list[tuple[int, int]]:
    """Return (blocks of chunks, blocks of decodes) for a step of `tokens` tokens.

    Chunks attend to their own blocks, some of them in part; to these and the blocks of
    a long request that goes on; or to a number between. Decodes have a quarter of the
    pool, or all of it; beside the longest chunks this difference hardly matters.
    """
    own = memory.blocks_for(tokens * 5 // 4)
    beside = own + memory.blocks_for(_longest(memory))
    between = round(math.sqrt(own * beside))
    # Odd, so that the number of keys is no power of 2: 272 tokens of tiny on a CPU took
    # 9.6 ms with 31 blocks, 14.7 with 32 and 10.0 with 33.
    own, between, beside = (size | 1 for size in (own, between, beside))
    whole = memory.num_blocks if limits.decode_rows else 0
    attended = (max(-(-whole // 4), limits.decode_rows), whole)
    if not limits.splits:
        return [(own, blocks) for blocks in attended]
    return [*itertools.product((own, between), attended), (beside, whole)]


def _longest(memory: KVMemory) -> int:
    """Return the tokens of the longest request that an instance can hold."""
    return min(memory.max_context, memory.num_blocks * memory.block_tokens)


def _sizes(low: int, high: int, *steps: float, factor: int = 2) -> tuple[int, ...]:
    """Return low * factor**i times each of `steps`, below `high`; and `high`."""
    sizes = {high} if high else set[int]()
    size = low
    while size < high:
        sizes |= {int(size * step) for step in steps}
        size *= factor
    return tuple(sorted(size for size in sizes if size <= high))
