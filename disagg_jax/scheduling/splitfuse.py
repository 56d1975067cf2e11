"""Dynamic SplitFuse: forward passes of one size, from decodes and pieces of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    RequestView,
    StepLimits,
    check_budget,
    check_parameters,
)
from disagg_jax.scheduling.preemption import FOREVER


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitFuse:
    """Every step: a token of each that runs, then prompts until the budget is hit.

    Long prompts are split and short ones composed, the last one split too if need be.
    The budget is a target, the same for any load: throughput has levelled off there. A
    decode without a free block sits out a step; if nothing can run at all, the last one
    in the queue drops its KV and starts again behind everybody.
    Source: DeepSpeed-FastGen, `facts/schedulers.md` 1.5; defaults of DeepSpeed-MII.

    Raises:
      ValueError: if the decodes alone could exceed the budget.
    """

    token_budget: int = 768  # tokens in a step; max_ragged_batch_size
    max_seqs: int = 512  # requests in a step; max_ragged_sequence_count

    def __post_init__(self) -> None:
        check_parameters(self, token_budget=self.token_budget, max_seqs=self.max_seqs)
        check_budget(self, "token_budget", self.token_budget, self.max_seqs)

    @property
    def limits(self) -> StepLimits:
        return StepLimits(
            prefill_tokens=self.token_budget,
            prefill_rows=self.max_seqs,
            decode_rows=self.max_seqs,
            mixed=True,
            splits=True,
        )

    def plan(self, instance: InstanceView) -> Plan:
        decodes, free = self._decodes(instance)
        chunks = self._prompts(instance, len(decodes), free)
        if not chunks and not decodes:
            resident = [*instance.partial, *instance.running]
            return Plan(preempt=resident[-1:], to_back=True)
        lasts = not chunks and len(decodes) == len(instance.running)
        return Plan(chunks, decodes, repeats=FOREVER if lasts else 1)

    def _decodes(self, instance: InstanceView) -> tuple[Collection[RequestView], int]:
        """Those that decode, and the blocks that are free beside them."""
        blocks, free = instance.blocks, instance.blocks.free
        running = instance.running
        if len(running) <= self.max_seqs and instance.blocks_for_next_token <= free:
            return running, free - instance.blocks_for_next_token
        decodes: list[RequestView] = []
        for request in running:
            missing = blocks.missing(request.id, request.num_tokens)
            if missing <= free and len(decodes) < self.max_seqs:
                free -= missing
                decodes.append(request)
        return decodes, free

    def _prompts(self, instance: InstanceView, rows: int, free: int) -> list[Chunk]:
        """Pieces of prompts for what `rows` decodes leave of the budget.

        Not even a part of a prompt is taken before there are blocks for the rest of it,
        but only those of the part are used up.
        """
        blocks, left = instance.blocks, self.token_budget - rows
        chunks: list[Chunk] = []
        for request in [*instance.partial, *instance.waiting]:
            full = rows + len(chunks) >= self.max_seqs
            if (
                not left
                or full
                or blocks.missing(request.id, request.num_tokens) > free
            ):
                break
            tokens = min(request.num_tokens - request.cached_tokens, left)
            chunk = Chunk(request, tokens, request.cached_tokens + tokens)
            free -= blocks.missing(request.id, chunk.reserve)
            left -= tokens
            chunks.append(chunk)
        return chunks
