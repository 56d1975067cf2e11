"""Dynamic SplitFuse: forward passes of one size, of decodes and pieces of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import ClassVar

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    RequestView,
    StepLimits,
    check_parameters,
)
from disagg_jax.scheduling.preemption import FOREVER
from disagg_jax.scheduling.tuning import StepSize, level_in_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitFuse:
    """Every step: one token of each running request, and prompts up to the budget.

    Long prompts are split and short ones composed; the last of a step may be split too.
    The budget is a target, equal for any load: throughput has levelled off there. A
    decode without a free block skips a step. If no request can run, the last one in the
    queue drops its KV and starts again at the end of the queue.
    Source: the DeepSpeed-FastGen blog; rules and defaults of DeepSpeed-MII @ d100a85.

    Raises:
      ValueError: if the decodes alone could exceed the budget.
    """

    step_size: ClassVar = StepSize("token_budget", level_in_time)

    token_budget: int = 768  # tokens in a step; max_ragged_batch_size
    max_seqs: int = 512  # requests in a step; max_ragged_sequence_count

    def __post_init__(self) -> None:
        check_parameters(self, "token_budget", "max_seqs", budget="token_budget")

    @property
    def limits(self) -> StepLimits:
        return StepLimits.of_chunks(self.token_budget, self.max_seqs)

    def plan(self, instance: InstanceView) -> Plan:
        decodes, free = self._decodes(instance)
        chunks = self._prompts(instance, len(decodes), free)
        if not chunks and not decodes:
            resident = [*instance.partial, *instance.running]
            return Plan(preempt=resident[-1:], to_back=True)
        lasts = not chunks and len(decodes) == len(instance.running)
        return Plan(chunks, decodes, repeats=FOREVER if lasts else 1)

    def _decodes(self, instance: InstanceView) -> tuple[Collection[RequestView], int]:
        """Return the requests that decode, and the blocks that they leave free."""
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
        """Make pieces of prompts for the budget that `rows` decodes leave.

        A prompt begins only if there are blocks for all of it, but a piece uses up only
        its own.
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
            chunk = Chunk.piece(request, left)
            free -= blocks.missing(request.id, chunk.reserve)
            left -= chunk.tokens
            chunks.append(chunk)
        return chunks
