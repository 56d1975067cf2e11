"""The prefill side of disaggregation in chunks: KV can leave chunk by chunk."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    RequestView,
    StepLimits,
    check_parameters,
)
from disagg_jax.scheduling.tuning import StepSize, saturating_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillChunked:
    """Every step: chunks of prompts in order of arrival, up to the budget.

    A prompt begins when there are blocks for all of it, and none overtakes another.
    Steps of equal length keep pipeline stages even. If KV leaves while its prompt is
    computed, only the last chunk's KV is left at the time of the first token.
    Source: the chunked prefill instances of Mooncake (FAST'25), section 5.1.
    """

    step_size: ClassVar = StepSize("token_budget", saturating_prompt)

    token_budget: int = 512  # prompt tokens in a step
    max_seqs: int = 64  # prompts in a step

    def __post_init__(self) -> None:
        check_parameters(self, "token_budget", "max_seqs")

    @property
    def limits(self) -> StepLimits:
        return StepLimits.of_chunks(self.token_budget, self.max_seqs, decodes=False)

    def plan(self, instance: InstanceView) -> Plan:
        left, free = self.token_budget, instance.blocks.free
        chunks: list[Chunk] = []

        def add(request: RequestView) -> None:
            nonlocal left
            chunks.append(Chunk.up_to(request, left))
            left -= chunks[-1].tokens

        for request in instance.partial:
            if left and len(chunks) < self.max_seqs:
                add(request)
        for request in instance.waiting:
            free -= instance.blocks.missing(request.id, request.num_tokens)
            if free < 0 or not left or len(chunks) >= self.max_seqs:
                break
            add(request)
        return Plan(chunks)
