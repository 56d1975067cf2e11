"""TensorRT-LLM: chunked prompts beside decodes, and no request is ever evicted."""

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
from disagg_jax.scheduling.preemption import FOREVER
from disagg_jax.scheduling.tuning import StepSize, largest_in_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoEvict:
    """Every step: all decodes; then prompts that were begun; then new prompts.

    Prompts share the rest of the budget. A prompt is admitted if there are blocks for
    it and for its longest output, which it holds from then on: so no request is
    preempted. Where memory is not short, it plans the steps of Sarathi-Serve.

    The limits are the defaults of TensorRT-LLM: max_num_tokens 8192, max_batch_size
    2048. So is the capacity policy, GUARANTEED_NO_EVICT. Chunked context has to be
    asked for there (enable_chunked_prefill): without it, a prompt for which the rest of
    a step is too small waits for the next one.
    Source: `TorchLlmArgs` and `SchedulerConfig`, tensorrt_llm/llmapi/llm_args.py;
    nvidia.github.io/TensorRT-LLM, "Useful Runtime Options".

    Raises:
      ValueError: if the decodes alone could exceed the budget.
    """

    step_size: ClassVar = StepSize("max_batched_tokens", largest_in_time)

    max_batched_tokens: int = 8192  # tokens in a step, decodes included
    max_seqs: int = 2048  # requests with KV at the same time

    def __post_init__(self) -> None:
        counts = ("max_batched_tokens", "max_seqs")
        check_parameters(self, *counts, budget="max_batched_tokens")

    @property
    def limits(self) -> StepLimits:
        return StepLimits.of_chunks(self.max_batched_tokens, self.max_seqs)

    def plan(self, instance: InstanceView) -> Plan:
        decodes = instance.running
        left = self.max_batched_tokens - len(decodes)
        free, resident = instance.blocks.free, instance.resident
        chunks: list[Chunk] = []
        for request in (*instance.partial, *instance.waiting):
            missing = instance.blocks.missing(request.id, request.max_cached_tokens)
            begun = missing == 0  # its blocks were all reserved with its first chunk
            full = not begun and resident >= self.max_seqs
            if not left or full or missing > free:
                break
            tokens = min(left, request.num_tokens - request.cached_tokens)
            chunks.append(Chunk(request, tokens, reserve=request.max_cached_tokens))
            left -= tokens
            free -= missing
            resident += not begun
        return Plan(chunks, decodes, repeats=1 if chunks else FOREVER)
