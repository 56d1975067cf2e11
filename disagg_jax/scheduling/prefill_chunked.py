"""The prefill side of disaggregation in chunks, so that KV can leave by chunks."""

from __future__ import annotations

import dataclasses

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    RequestView,
    StepLimits,
    check_parameters,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillChunked:
    """In order of arrival, chunks of prompts that fill the budget of a step.

    A prompt is begun when there are blocks for all of it, and no later one before it.
    Steps of one length keep pipeline stages even; and where KV leaves while its prompt
    is computed, all but the last chunk's is gone by the time of the first token.
    Source: the chunked prefill instances of Mooncake (FAST'25), section 5.1.
    """

    token_budget: int = 512  # prompt tokens in a step
    max_seqs: int = 64  # prompts in a step

    def __post_init__(self) -> None:
        check_parameters(self, token_budget=self.token_budget, max_seqs=self.max_seqs)

    @property
    def limits(self) -> StepLimits:
        return StepLimits(
            prefill_tokens=self.token_budget,
            prefill_rows=self.max_seqs,
            decode_rows=0,
            mixed=True,
            splits=True,
        )

    def plan(self, instance: InstanceView) -> Plan:
        left, free = self.token_budget, instance.blocks.free
        chunks: list[Chunk] = []

        def add(request: RequestView) -> None:
            nonlocal left
            tokens = min(request.num_tokens - request.cached_tokens, left)
            chunks.append(Chunk(request, tokens, request.num_tokens))
            left -= tokens

        for request in instance.partial:
            if left and len(chunks) < self.max_seqs:
                add(request)
        for request in instance.waiting:
            free -= instance.blocks.missing(request.id, request.num_tokens)
            if free < 0 or not left or len(chunks) >= self.max_seqs:
                break
            add(request)
        return Plan(chunks)
