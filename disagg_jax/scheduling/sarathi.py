"""SARATHI: decode-maximal batches of one prompt chunk and all decodes."""

from __future__ import annotations

import dataclasses
import itertools
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
from disagg_jax.scheduling.tuning import StepSize, best_chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sarathi:
    """Every step: exactly one chunk, of one prompt at a time, and up to B - 1 decodes.

    The decodes ride along ("piggybacking") and make the chunk smaller, so that the step
    has `chunk_tokens` tokens and fills the device's tiles. Like Orca it holds memory
    for the longest output.
    Source: SARATHI (arXiv 2308.16369), section 4.

    Raises:
      ValueError: if the decodes alone could fill the chunk.
    """

    step_size: ClassVar = StepSize("chunk_tokens", best_chunk)

    chunk_tokens: int = 256  # C: tokens in a step, decodes included
    max_seqs: int = 16  # B: requests in a step

    def __post_init__(self) -> None:
        check_parameters(self, "chunk_tokens", "max_seqs", budget="chunk_tokens")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(
            prefill_tokens=self.chunk_tokens,
            prefill_rows=1,
            decode_rows=self.max_seqs,
            mixed=True,
            splits=True,
        )

    def plan(self, instance: InstanceView) -> Plan:
        decodes = list(itertools.islice(instance.running, self.max_seqs))
        prompt = self._prompt(instance)
        if prompt is None or len(decodes) == self.max_seqs:
            return Plan(decodes=decodes, repeats=FOREVER)
        left = prompt.num_tokens - prompt.cached_tokens
        tokens = min(left, self.chunk_tokens - len(decodes))
        return Plan([Chunk(prompt, tokens, prompt.max_cached_tokens)], decodes)

    def _prompt(self, instance: InstanceView) -> RequestView | None:
        """Return the prompt that was begun, or else the next, if it fits to its end."""
        if instance.partial:
            return instance.partial[0]
        if not instance.waiting:
            return None
        head = instance.waiting[0]
        fits = (
            instance.blocks.missing(head.id, head.max_cached_tokens)
            <= instance.blocks.free
        )
        return head if fits else None
