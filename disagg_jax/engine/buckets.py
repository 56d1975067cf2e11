"""The listed shapes that programs are compiled for; nothing else is ever run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.work import Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes in increasing order; work is padded to the next one."""

    prefill_tokens: tuple[int, ...]  # prompt tokens in one prefill step
    prefill_rows: tuple[int, ...]  # prompts in one prefill step
    decode_rows: tuple[int, ...]  # requests in one decode step
    pool_blocks: tuple[int, ...]  # front of the KV pool that a decode step reads
    transfer_blocks: tuple[int, ...]  # KV blocks in one transfer

    @classmethod
    def for_limits(
        cls, *, memory: KVMemory, prefill_tokens: int, prefill_rows: int, max_seqs: int
    ) -> Buckets:
        """Buckets up to the given limits; about two dozen programs for an instance.

        Args:
          prefill_tokens: prompt tokens a policy puts in one step at most. A recomputed
            request can be longer than any prompt, so the longest context counts as well.
          prefill_rows: prompts in one step at most.
          max_seqs: requests that decode together at most.
        """
        most_blocks = min(memory.blocks_for(memory.max_context), memory.num_blocks)
        most_tokens = max(prefill_tokens, memory.max_context)
        few_rows = min(4, prefill_rows)
        return cls(
            prefill_tokens=_geometric(32, most_tokens, steps=(1.0, 1.5)),
            prefill_rows=tuple(sorted({few_rows, prefill_rows})),
            decode_rows=_geometric(1, max_seqs, steps=(1.0,)),
            pool_blocks=_geometric(16, memory.num_blocks, steps=(1.0,)),
            transfer_blocks=_geometric(1, most_blocks, steps=(1.0, 1.5)),
        )

    def step_shape(self, slices: Sequence[Slice]) -> StepShape:
        """The smallest listed shape that holds `slices`.

        Raises:
          ValueError: if the step mixes prompts and decodes, starts a prompt in its
            middle, or is larger than every bucket.
        """
        if all(part.is_decode for part in slices):
            return DecodeShape(
                _at_least("decode rows", self.decode_rows, len(slices)),
                _at_least(
                    "pool blocks",
                    self.pool_blocks,
                    1 + max(max(part.blocks) for part in slices),
                ),
            )
        if any(part.start or not part.samples for part in slices):
            raise ValueError(
                "a step must be whole prompts or decodes only, got slices (start, "
                f"count) {[(part.start, part.count) for part in slices]}"
            )
        tokens = sum(part.count for part in slices)
        return PrefillShape(
            _at_least("prefill tokens", self.prefill_tokens, tokens),
            _at_least("prefill rows", self.prefill_rows, len(slices)),
        )

    def step_shapes(self, role: Role) -> list[StepShape]:
        """Every step shape that an instance with `role` can need."""
        shapes: list[StepShape] = []
        if role is not Role.DECODE:
            shapes += [
                PrefillShape(tokens, rows)
                for tokens in self.prefill_tokens
                for rows in self.prefill_rows
            ]
        if role is not Role.PREFILL:
            shapes += [
                DecodeShape(rows, blocks)
                for rows in self.decode_rows
                for blocks in self.pool_blocks
            ]
        return shapes

    def transfer_size(self, blocks: int) -> int:
        """The bucket, in blocks, for a transfer of `blocks` blocks."""
        return _at_least("transfer blocks", self.transfer_blocks, blocks)


def _geometric(
    low: int, high: int, *, steps: Iterable[float]
) -> tuple[int, ...]:
    """low, 2 low, 4 low, ... each times every one of `steps`, up to and with `high`."""
    sizes = {high}
    size = low
    while size < high:
        sizes |= {int(size * step) for step in steps}
        size *= 2
    return tuple(sorted(size for size in sizes if size <= high))


def _at_least(what: str, buckets: Sequence[int], size: int) -> int:
    for bucket in buckets:
        if bucket >= size:
            return bucket
    raise ValueError(f"{what}: expected at most {buckets[-1]}, got {size}")
