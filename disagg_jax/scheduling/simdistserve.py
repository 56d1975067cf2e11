"""The rules of DistServe's own simulator, to reproduce its numbers request by request.

They differ from the paper: no L_m, no KV memory, free transfers, and a decode batch of
at most 50,000 tokens on any device.
Source: LLMServe/DistServe @ 82831f16, folder `simdistserve`.
"""

from __future__ import annotations

import dataclasses

from disagg_jax.scheduling.interface import (
    InstanceView,
    Plan,
    RequestView,
    StepLimits,
    check_parameters,
)
from disagg_jax.scheduling.preemption import FOREVER
from disagg_jax.scheduling.prefill_only import PrefillOnly

NO_LIMIT = 1_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobinDecode:
    """Decode from the head of the queue, up to a cap of tokens; pull all KV at once.

    Requests that decoded go to the tail, behind requests that came meanwhile.
    """

    token_cap: int = 50_000  # sum of (cached tokens + 1) over a batch

    def __post_init__(self) -> None:
        check_parameters(self, "token_cap")

    @property
    def limits(self) -> StepLimits:
        return StepLimits(prefill_tokens=0, prefill_rows=0, decode_rows=NO_LIMIT)

    def plan(self, instance: InstanceView) -> Plan:
        rows, tokens = len(instance.running), instance.running_context
        if tokens + rows <= self.token_cap:
            spare = self.token_cap - tokens - rows
            repeats = spare // rows + 1 if rows else FOREVER
            return Plan(decodes=instance.running, repeats=repeats)
        alone = instance.running[:1]  # the head, if it is longer than the cap
        return Plan(decodes=instance.running_within(self.token_cap) or alone)

    def admits_pull(self, instance: InstanceView, request: RequestView) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillThenDecode:
    """Prefill all waiting requests first, then decode, on a colocated instance."""

    prefill: PrefillOnly = PrefillOnly(token_budget=66_144, max_seqs=NO_LIMIT)
    decode: RoundRobinDecode = RoundRobinDecode()

    @property
    def limits(self) -> StepLimits:
        rows, tokens = self.prefill.max_seqs, self.prefill.token_budget
        return StepLimits(
            prefill_tokens=tokens, prefill_rows=rows, decode_rows=NO_LIMIT
        )

    def plan(self, instance: InstanceView) -> Plan:
        prefill = self.prefill.plan(instance)
        return prefill if prefill.chunks else self.decode.plan(instance)
