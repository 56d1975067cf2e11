"""The listed shapes that programs are compiled for; nothing else is ever run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.scheduling.view import StepLimits
from disagg_jax.work import Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes in increasing order; work is padded to the next one.

    No prefill sizes, or no decode sizes, where an instance never does that.
    """

    prefill_tokens: tuple[int, ...]  # prompt tokens in one prefill step
    prefill_rows: tuple[int, ...]  # prompts in one prefill step
    decode_rows: tuple[int, ...]  # requests in one decode step
    pool_blocks: tuple[int, ...]  # front of the KV pool that a decode step reads
    transfer_blocks: tuple[int, ...]  # KV blocks in one transfer

    @classmethod
    def for_limits(cls, limits: StepLimits, memory: KVMemory) -> Buckets:
        """Sizes up to what a policy can ask for: about two dozen programs an instance.

        A recomputed request can be longer than any prompt, so a prefill step can hold
        the longest context whatever the policy's limit.
        """
        longest = min(memory.max_context, memory.num_blocks * memory.block_tokens)
        tokens = max(limits.prefill_tokens, longest)
        return cls(
            prefill_tokens=_sizes(32, tokens, 1.0, 1.5) if limits.prefill_rows else (),
            prefill_rows=_few_or_all(limits.prefill_rows),
            decode_rows=_sizes(1, limits.decode_rows, 1.0),
            pool_blocks=_sizes(16, memory.num_blocks, 1.0)
            if limits.decode_rows
            else (),
            transfer_blocks=_sizes(1, memory.blocks_for(longest), 1.0, 1.5),
        )

    @property
    def step_shapes(self) -> list[StepShape]:
        """Every step shape."""
        shapes: list[StepShape] = [
            PrefillShape(tokens, rows)
            for tokens in self.prefill_tokens
            for rows in self.prefill_rows
        ]
        shapes += [
            DecodeShape(rows, blocks)
            for rows in self.decode_rows
            for blocks in self.pool_blocks
        ]
        return shapes

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """The smallest listed shape that holds `slices`.

        Raises:
          ValueError: if the step mixes prompts and decodes, starts a prompt in its
            middle, or is larger than every bucket.
        """
        if all(part.is_decode for part in slices):
            return self.decode_shape(
                len(slices), 1 + max(max(part.blocks) for part in slices)
            )
        if any(part.start or not part.samples for part in slices):
            raise ValueError(
                "a step must be whole prompts or decodes only, got slices (start, "
                f"count) {[(part.start, part.count) for part in slices]}"
            )
        return self.prefill_shape(sum(part.count for part in slices), len(slices))

    def prefill_shape(self, tokens: int, rows: int) -> PrefillShape:
        return PrefillShape(
            _at_least("prefill tokens", self.prefill_tokens, tokens),
            _at_least("prefill rows", self.prefill_rows, rows),
        )

    def decode_shape(self, rows: int, blocks: int) -> DecodeShape:
        return DecodeShape(
            _at_least("decode rows", self.decode_rows, rows),
            _at_least("pool blocks", self.pool_blocks, blocks),
        )

    def transfer_size(self, blocks: int) -> int:
        """The size, in blocks, for a transfer of `blocks` blocks."""
        return _at_least("transfer blocks", self.transfer_blocks, blocks)


def _sizes(low: int, high: int, *steps: float) -> tuple[int, ...]:
    """low, 2 low, 4 low, ... each times every one of `steps`, up to and with `high`."""
    sizes = {high} if high else set[int]()
    size = low
    while size < high:
        sizes |= {int(size * step) for step in steps}
        size *= 2
    return tuple(sorted(size for size in sizes if size <= high))


def _few_or_all(rows: int) -> tuple[int, ...]:
    """Unembedding is paid for every row, so a step of few prompts has its own size."""
    return tuple(sorted({min(4, rows), rows} - {0}))


def _at_least(what: str, sizes: Sequence[int], size: int) -> int:
    for listed in sizes:
        if listed >= size:
            return listed
    raise ValueError(f"{what}: expected at most {max(sizes, default=0)}, got {size}")
