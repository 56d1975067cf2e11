"""Cost models: how long work takes, without doing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from disagg_jax.backend import Outcome
from disagg_jax.work import Step, StepLoad, Task, Transfer


class CostModel(Protocol):
    """Durations in seconds."""

    def step_s(self, instance: int, load: StepLoad) -> float:
        """One step of an instance."""
        ...

    def decode_s(self, instance: int, decodes: int, context: int) -> float:
        """The same for a step of decodes only. Called for each iteration."""
        ...

    def transfer_s(self, transfer: Transfer) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCost:
    """step = fixed + per prompt token + per decode token + per context token read.

    The simplest model that shows interference; every coefficient is in seconds. With
    all but `step_base_s` zero it is constant.
    """

    step_base_s: float  # of every step: launch, streaming the weights
    prefill_token_s: float = 0.0  # per prompt token computed
    decode_token_s: float = 0.0  # per request that decodes
    context_token_s: float = 0.0  # per cached token that a decode attends to
    transfer_base_s: float = 0.0  # latency of the link
    transfer_token_s: float = 0.0  # per token of KV moved

    def step_s(self, instance: int, load: StepLoad) -> float:
        prefill = sum(count for _, count in load.chunks)
        decode_s = self.decode_s(instance, load.decodes, load.context)
        return decode_s + self.prefill_token_s * prefill

    def decode_s(self, instance: int, decodes: int, context: int) -> float:
        return (
            self.step_base_s
            + self.decode_token_s * decodes
            + self.context_token_s * context
        )

    def transfer_s(self, transfer: Transfer) -> float:
        return self.transfer_base_s + self.transfer_token_s * transfer.context


@dataclasses.dataclass(frozen=True)
class CostExecutor:
    """An `Executor` that only says how long the work would take."""

    cost: CostModel

    def run(self, work: Task) -> Outcome:
        if isinstance(work, Transfer):
            return Outcome((self.cost.transfer_s(work),))
        if work.iterations > 1:
            return Outcome(self._span_s(work))
        return Outcome((self.cost.step_s(work.instance, work.load),))

    def _span_s(self, step: Step) -> Iterator[float]:
        decodes, context = step.load.decodes, step.load.context
        for i in range(step.iterations):
            yield self.cost.decode_s(step.instance, decodes, context + i * decodes)
