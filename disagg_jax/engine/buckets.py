"""The listed shapes that programs are compiled for; nothing else is ever run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.scheduling.view import StepLimits
from disagg_jax.work import Slice

_TOKENS_PER_ROW = 8  # of a prefill shape: shorter prompts take the next size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes in increasing order; work is padded to the next one.

    Attributes:
      prefill: one shape for each number of tokens; none where an instance never
        prefills.
      decode_rows: requests in one decode step; none where it never decodes.
      pool_blocks: lengths of the front of the KV pool that a decode step reads.
      transfer_blocks: KV blocks in one transfer.
    """

    prefill: tuple[PrefillShape, ...]
    decode_rows: tuple[int, ...]
    pool_blocks: tuple[int, ...]
    transfer_blocks: tuple[int, ...]

    @classmethod
    def for_limits(cls, limits: StepLimits, memory: KVMemory) -> Buckets:
        """Sizes up to what a policy can ask for: a few dozen programs an instance.

        A recomputed request can be longer than any prompt, so a prefill step can hold
        the longest context whatever the policy's limit.
        """
        longest = min(memory.max_context, memory.num_blocks * memory.block_tokens)
        rows = limits.prefill_rows
        tokens = max(limits.prefill_tokens, longest, rows * _TOKENS_PER_ROW)
        sizes = _sizes(32, tokens, 1.0, 1.5) if rows else ()
        return cls(
            prefill=tuple(
                PrefillShape(size, min(rows, size // _TOKENS_PER_ROW)) for size in sizes
            ),
            decode_rows=_sizes(1, limits.decode_rows, 1.0),
            # Steps of 4: finer ones would be more programs, and a pool in full use is
            # read to its end anyway.
            pool_blocks=_sizes(16, memory.num_blocks, 1.0, factor=4)
            if limits.decode_rows
            else (),
            transfer_blocks=_sizes(1, memory.blocks_for(longest), 1.0, 1.5),
        )

    @property
    def step_shapes(self) -> list[StepShape]:
        """Every step shape."""
        return [*self.prefill, *self._decode.values()]

    @functools.cached_property
    def _decode(self) -> dict[tuple[int, int], DecodeShape]:
        """One object for each shape: it remembers its layout."""
        sizes = itertools.product(self.decode_rows, self.pool_blocks)
        return {size: DecodeShape(*size) for size in sizes}

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """The smallest listed shape that holds `slices`.

        Raises:
          ValueError: if the step mixes prompts and decodes, starts a prompt in its
            middle, or is larger than every bucket.
        """
        if all(part.is_decode for part in slices):
            blocks = itertools.chain.from_iterable(part.blocks for part in slices)
            return self.decode_shape(len(slices), 1 + max(blocks))
        if any(part.start or not part.samples for part in slices):
            raise ValueError(
                "a step must be whole prompts or decodes only, got slices (start, "
                f"count) {[(part.start, part.count) for part in slices]}"
            )
        return self.prefill_shape(sum(part.count for part in slices), len(slices))

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
