"""Cost models: how long work takes, without doing it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from disagg_jax.backend import Outcome
from disagg_jax.work import Step, Transfer, Work


class CostModel(Protocol):
    """Durations in seconds."""

    def step_s(self, step: Step) -> float: ...

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

    def step_s(self, step: Step) -> float:
        decodes = [part for part in step.slices if part.is_decode]
        prefill = sum(part.count for part in step.slices) - len(decodes)
        return (
            self.step_base_s
            + self.prefill_token_s * prefill
            + self.decode_token_s * len(decodes)
            + self.context_token_s * sum(part.start + 1 for part in decodes)
        )

    def transfer_s(self, transfer: Transfer) -> float:
        return self.transfer_base_s + self.transfer_token_s * transfer.context


@dataclasses.dataclass(frozen=True)
class CostExecutor:
    """An `Executor` that only says how long the work would take."""

    cost: CostModel

    def run(self, work: Work) -> Outcome:
        if isinstance(work, Step):
            return Outcome(self.cost.step_s(work))
        return Outcome(self.cost.transfer_s(work))
