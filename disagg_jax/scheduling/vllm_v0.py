"""Colocated continuous batching as in vLLM v0: whole prompts first, then decodes."""

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
from disagg_jax.scheduling.preemption import decode_all
from disagg_jax.scheduling.tuning import StepSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillFirst:
    """A prefill-only step if waiting prompts can be admitted; else a decode-only step.

    Prompts come from the head of the queue up to the first that does not fit; decodes
    stall meanwhile. A prompt longer than the cap runs alone (vLLM would refuse it).
    Source: vLLM v0 without chunked prefill, as in microsoft/sarathi-serve @ 96f9911.
    """

    step_size: ClassVar = StepSize("max_batched_tokens")

    max_batched_tokens: int = 2048  # prompt tokens in one prefill step
    max_seqs: int = 256  # requests with KV at the same time
    watermark: float = 0.01  # share of the blocks that admission leaves free

    def __post_init__(self) -> None:
        counts = ("max_batched_tokens", "max_seqs")
        check_parameters(self, *counts, share="watermark")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(
            prefill_tokens=self.max_batched_tokens,
            prefill_rows=self.max_seqs,
            decode_rows=self.max_seqs,
        )

    def plan(self, instance: InstanceView) -> Plan:
        return self._prefill(instance) or decode_all(instance)

    def _prefill(self, instance: InstanceView) -> Plan | None:
        blocks = instance.blocks
        free, tokens = blocks.free, 0
        reserve = int(self.watermark * blocks.memory.num_blocks)
        chunks: list[Chunk] = []
        for request in instance.waiting:
            empty = not chunks and not instance.resident
            free -= blocks.missing(request.id, request.num_tokens)
            tokens += request.num_tokens
            if (
                free < (0 if empty else reserve)
                or (tokens > self.max_batched_tokens and chunks)
                or instance.resident + len(chunks) >= self.max_seqs
            ):
                break
            chunks.append(Chunk.whole(request))
        return Plan(chunks) if chunks else None
