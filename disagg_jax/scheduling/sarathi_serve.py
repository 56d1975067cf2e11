"""Sarathi-Serve: stall-free batches under a token budget."""

from __future__ import annotations

import dataclasses

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    StepLimits,
    check_budget,
    check_parameters,
    check_share,
)
from disagg_jax.scheduling.preemption import decode_all, fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SarathiServe:
    """Every step: all decodes; then prompts that were begun; then new ones.

    Prompts get what the decodes leave of the budget, several if they are short, so that
    no decode waits for more than a budget's worth of tokens. A prompt is admitted if
    its blocks are free above the watermark; preemption is vLLM's.
    Source: Sarathi-Serve (OSDI'24) Algorithm 3, `facts/schedulers.md` 1.4.

    Raises:
      ValueError: if the decodes alone could exceed the budget.
    """

    token_budget: int = 512  # tau: tokens in a step, decodes included
    max_seqs: int = 128  # requests with KV at the same time
    watermark: float = 0.01  # share of the blocks that admission leaves free

    def __post_init__(self) -> None:
        check_parameters(self, token_budget=self.token_budget, max_seqs=self.max_seqs)
        check_budget(self, "token_budget", self.token_budget, self.max_seqs)
        check_share(self, "watermark", self.watermark)

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
        plan = decode_all(instance)
        left = self.token_budget - len(plan.decodes)
        chunks: list[Chunk] = []
        for request in instance.partial:
            if left and request not in plan.preempt:
                tokens = min(request.num_tokens - request.cached_tokens, left)
                chunks.append(Chunk(request, tokens, request.num_tokens))
                left -= tokens
        chunks += self._admit(instance, left)
        return dataclasses.replace(plan, chunks=chunks)

    def _admit(self, instance: InstanceView, left: int) -> list[Chunk]:
        """Chunks of waiting prompts, `left` tokens in all.

        None where the decodes take more blocks than are free: who makes room for them
        is before all that wait, even if that frees more than they take.
        """
        chunks: list[Chunk] = []
        taken = instance.blocks_for_next_token  # blocks that are promised already
        for request in instance.waiting:
            full = instance.resident + len(chunks) >= self.max_seqs
            if not left or full or not fits(instance, request, self.watermark, taken):
                break
            tokens = min(request.num_tokens, left)
            chunks.append(Chunk(request, tokens, request.num_tokens))
            left -= tokens
            taken += instance.blocks.missing(request.id, request.num_tokens)
        return chunks
