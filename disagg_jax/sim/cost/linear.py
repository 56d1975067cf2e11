"""Step times as a linear function of the work: no model, no device."""

from __future__ import annotations

import dataclasses

from disagg_jax.sim.cost.interface import Decoder
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCost:
    """Step time = fixed + per prompt token + per decode + per cached token read.

    The simplest `DeploymentCost` that shows interference. All instances cost the same,
    and every coefficient is in seconds. Steps take constant time where only
    `step_base_s` is not zero.
    """

    step_base_s: float  # of every step: launches, streaming the weights
    prefill_token_s: float = 0.0  # per prompt token computed
    decode_token_s: float = 0.0  # per request that decodes
    context_token_s: float = 0.0  # per cached token that a decode attends to
    transfer_base_s: float = 0.0  # latency of the link
    transfer_token_s: float = 0.0  # per token of KV moved
    transfer_parts: int = 1  # of KV that is sent while its prompt is computed
    # Pipeline stages of each instance; () is one each. A step takes equally long on
    # every stage.
    pp: tuple[int, ...] = ()

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        decode_s = self._decode_s(load.decodes, load.context)
        step_s = decode_s + self.prefill_token_s * load.prompt_tokens
        stages = self.pp[instance] if self.pp else 1
        return (step_s / stages,) * stages

    def decoder(self, instance: int) -> Decoder:
        return self._decode_s

    def _decode_s(self, decodes: int, context: int) -> float:
        return (
            self.step_base_s
            + self.decode_token_s * decodes
            + self.context_token_s * context
        )

    def hop(self, transfer: Transfer) -> Hop:
        parts = self.transfer_parts if transfer.step else 1
        tokens = transfer.context / parts
        part_s = self.transfer_base_s + self.transfer_token_s * tokens
        return Hop((part_s,) * parts)
