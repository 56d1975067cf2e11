"""Sarathi-Serve: stall-free batches under a token budget."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    StepLimits,
    check_parameters,
)
from disagg_jax.scheduling.preemption import decode_all, fits
from disagg_jax.scheduling.tuning import StepSize, largest_in_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class SarathiServe:
    """Every step: all decodes; then prompts that were begun; then new prompts.

    Prompts share the rest of the budget, several if they are short, so that no decode
    waits for more than a budget of tokens. That bounds the time between tokens (the
    paper's TBT). A prompt is admitted if its blocks are free above the watermark.
    Preemption is vLLM's.
    Source: Sarathi-Serve (OSDI'24), Algorithm 3.

    Raises:
      ValueError: if the decodes alone could exceed the budget.
    """

    step_size: ClassVar = StepSize("token_budget", largest_in_time)

    token_budget: int = 512  # tau: tokens in a step, decodes included
    max_seqs: int = 128  # requests with KV at the same time
    watermark: float = 0.01  # share of the blocks that admission leaves free

    def __post_init__(self) -> None:
        counts = ("token_budget", "max_seqs")
        check_parameters(self, *counts, budget="token_budget", share="watermark")

    @property
    def limits(self) -> StepLimits:
        return StepLimits.of_chunks(self.token_budget, self.max_seqs)

    def plan(self, instance: InstanceView) -> Plan:
        plan = decode_all(instance)
        left = self.token_budget - len(plan.decodes)
        chunks: list[Chunk] = []
        for request in instance.partial:
            if left and request not in plan.preempt:
                chunks.append(Chunk.up_to(request, left))
                left -= chunks[-1].tokens
        chunks += self._admit(instance, left)
        return dataclasses.replace(plan, chunks=chunks)

    def _admit(self, instance: InstanceView, left: int) -> list[Chunk]:
        """Make chunks of waiting prompts, `left` tokens in all.

        Admit no prompt if the decodes need more blocks than are free. Requests that
        make room for them come before all waiting ones, even if they free more blocks
        than the decodes take.
        """
        chunks: list[Chunk] = []
        taken = instance.blocks_for_next_token  # blocks that are promised already
        for request in instance.waiting:
            full = instance.resident + len(chunks) >= self.max_seqs
            if not left or full or not fits(instance, request, self.watermark, taken):
                break
            chunks.append(Chunk.up_to(request, left))
            left -= chunks[-1].tokens
            taken += instance.blocks.missing(request.id, request.num_tokens)
        return chunks
