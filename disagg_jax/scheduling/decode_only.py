"""The decode side of disaggregation: pull KV that fits, decode every request."""

from __future__ import annotations

import dataclasses

from disagg_jax.scheduling.interface import (
    InstanceView,
    Plan,
    RequestView,
    StepLimits,
    check_parameters,
)
from disagg_jax.scheduling.preemption import decode_all, fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOnly:
    """Reserve blocks for a request's KV before it is fetched; preempt as vLLM does.

    A preempted request goes back to a prefill instance, which computes prompt and
    generated tokens again and hands them over once more.
    Source: DistServe (OSDI'24) section 4.3 (pull), which does not describe preemption.
    """

    max_seqs: int = 256  # requests with KV at the same time
    watermark: float = 0.01  # share of the blocks that a pull leaves free

    def __post_init__(self) -> None:
        check_parameters(self, "max_seqs", share="watermark")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(prefill_tokens=0, prefill_rows=0, decode_rows=self.max_seqs)

    def plan(self, instance: InstanceView) -> Plan:
        return decode_all(instance)

    def admits_pull(self, instance: InstanceView, request: RequestView) -> bool:
        if instance.resident >= self.max_seqs:
            return False
        return fits(instance, request, self.watermark)
