"""Colocated continuous batching as in today's vLLM: running first, chunked prompts."""

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
from disagg_jax.scheduling.preemption import FOREVER, Room, fits
from disagg_jax.scheduling.tuning import StepSize, largest_in_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningFirst:
    """Every step: all running requests in order of arrival; then waiting ones.

    One budget of tokens serves both. A prompt that was begun runs like any other: it
    takes all of the budget that it can use, also before a later request that decodes.
    If blocks are missing, the last running request is preempted and computed again, and
    no prompt is admitted in that step. A prompt is admitted if there are blocks for all
    of it, but it takes only those of its chunk.

    Unlike Sarathi-Serve, it keeps no blocks for the rest of a begun prompt, has no
    watermark by default, and puts no decode before a prompt that came first. While no
    request is preempted, at most one prompt is begun, and it came last. So where memory
    is not short, the two plan equal steps.

    The defaults are those of `vllm serve` 0.33.0 on an A100 or a device with less than
    70 GiB; an H100 gets 8192 tokens and 1024 requests. Prefix caching is left out.
    Source: `vllm/v1/core/sched/scheduler.py`, `vllm/config/scheduler.py` and
    `EngineArgs.get_batch_defaults` of vLLM 0.33.0.

    The step size: vLLM has no rule, only advice: a small budget is good for ITL, a
    large one for TTFT (docs.vllm.ai/en/v0.33.0/configuration/optimization/). Its
    answer to a TPOT target is the largest budget within it, as for Sarathi-Serve.

    Raises:
      ValueError: if the decodes alone could exceed the budget. vLLM refuses it too.
    """

    step_size: ClassVar = StepSize("max_batched_tokens", largest_in_time)

    max_batched_tokens: int = 2048  # tokens in a step, decodes included
    max_seqs: int = 256  # requests with KV at the same time
    watermark: float = 0.0  # share of the blocks that admission leaves free

    def __post_init__(self) -> None:
        counts = ("max_batched_tokens", "max_seqs")
        check_parameters(self, *counts, budget="max_batched_tokens", share="watermark")

    @property
    def limits(self) -> StepLimits:
        return StepLimits.of_chunks(self.max_batched_tokens, self.max_seqs)

    def plan(self, instance: InstanceView) -> Plan:
        taken = instance.blocks_for_next_token
        if not instance.partial and taken <= instance.blocks.free:
            plan = Plan(decodes=instance.running, repeats=FOREVER)
        else:
            plan, taken = self._run(instance)
        if plan.preempt:
            return plan
        used = len(plan.decodes) + sum([chunk.tokens for chunk in plan.chunks])
        admitted = self._admit(instance, self.max_batched_tokens - used, taken)
        return dataclasses.replace(plan, chunks=[*plan.chunks, *admitted])

    def _run(self, instance: InstanceView) -> tuple[Plan, int]:
        """Plan the running requests within the budget; return the blocks taken too."""
        running, begun = instance.running, {r.id for r in instance.partial}
        left, room = self.max_batched_tokens, Room(instance)
        chunks: list[Chunk] = []
        decodes: list[RequestView] = []
        for request in room.requests:
            if not left:
                break
            if request.id in begun:
                chunk = Chunk.piece(request, left)
                if room.take(request, chunk.reserve):
                    chunks.append(chunk)
                    left -= chunk.tokens
            elif room.take(request, request.num_tokens):
                decodes.append(request)
                left -= 1
        # The view itself, where all of it decodes, is taken without a look at each.
        all_decode = len(decodes) == len(running)
        plan = Plan(chunks, running if all_decode else decodes, preempt=room.victims)
        return plan, instance.blocks.free - room.free

    def _admit(self, instance: InstanceView, left: int, taken: int) -> list[Chunk]:
        """Make chunks of waiting prompts, `left` tokens in all.

        Args:
          taken: free blocks that running requests get in this step.
        """
        chunks: list[Chunk] = []
        for request in instance.waiting:
            full = instance.resident + len(chunks) >= self.max_seqs
            if not left or full or not fits(instance, request, self.watermark, taken):
                break
            chunk = Chunk.piece(request, left)
            chunks.append(chunk)
            left -= chunk.tokens
            taken += instance.blocks.missing(request.id, chunk.reserve)
        return chunks
