"""Orca: iteration-level scheduling, selective batching, memory for the longest case."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    StepLimits,
    check_parameters,
)
from disagg_jax.scheduling.preemption import FOREVER
from disagg_jax.scheduling.tuning import StepSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orca:
    """Every step: all running requests, and whole prompts in order of arrival.

    A request is admitted if blocks for its prompt and its longest output are free, and
    holds them to its end. So no request is preempted, and few run at a time. The paper
    has no bound on the tokens of a step, but an engine's buffers need one; a longer
    prompt comes without other prompts.
    Source: Orca (OSDI'22), Algorithm 1.
    """

    step_size: ClassVar = StepSize("max_batched_tokens")

    max_seqs: int = 16  # requests in a step; the paper's max_bs
    max_batched_tokens: int = 4096  # prompt tokens in a step; Vidur's cap

    def __post_init__(self) -> None:
        check_parameters(self, "max_seqs", "max_batched_tokens")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(
            prefill_tokens=self.max_batched_tokens,
            prefill_rows=self.max_seqs,
            decode_rows=self.max_seqs,
            mixed=True,
        )

    def plan(self, instance: InstanceView) -> Plan:
        decodes = list(itertools.islice(instance.running, self.max_seqs))
        chunks: list[Chunk] = []
        free, tokens = instance.blocks.free, 0
        for request in instance.waiting:
            free -= instance.blocks.missing(request.id, request.max_cached_tokens)
            tokens += request.num_tokens
            too_long = tokens > self.max_batched_tokens and chunks
            full = len(decodes) + len(chunks) >= self.max_seqs
            if free < 0 or too_long or full:
                break
            left = request.num_tokens - request.cached_tokens
            chunks.append(Chunk(request, left, reserve=request.max_cached_tokens))
        return Plan(chunks, decodes, repeats=FOREVER)
