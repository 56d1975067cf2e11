"""The prefill side of disaggregation: whole prompts, batched up to L_m tokens."""

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
from disagg_jax.scheduling.tuning import StepSize, saturating_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillOnly:
    """Every step: prompts in order of arrival, up to the budget; a longer one alone.

    KV that waits to be pulled holds its blocks. So when decode is slow, requests queue
    here: this memory is the back-pressure.
    Source: DistServe (OSDI'24) section 4.3, where the budget is called L_m.
    """

    step_size: ClassVar = StepSize("token_budget", saturating_prompt)

    token_budget: int = 512  # L_m: the prompt length that saturates the device
    max_seqs: int = 64  # prompts in one step

    def __post_init__(self) -> None:
        check_parameters(self, "token_budget", "max_seqs")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(
            prefill_tokens=self.token_budget,
            prefill_rows=self.max_seqs,
            decode_rows=0,
        )

    def plan(self, instance: InstanceView) -> Plan:
        free, tokens = instance.blocks.free, 0
        chunks: list[Chunk] = []
        for request in instance.waiting:
            free -= instance.blocks.missing(request.id, request.num_tokens)
            tokens += request.num_tokens
            too_long = tokens > self.token_budget and chunks
            if free < 0 or too_long or len(chunks) >= self.max_seqs:
                break
            chunks.append(Chunk.whole(request))
        return Plan(chunks)
