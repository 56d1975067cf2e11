"""What a deployment's work costs in time, without doing it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

from disagg_jax.control.backend import Outcome
from disagg_jax.sim.cost.interface import InstanceCost
from disagg_jax.sim.hardware.network import Hop, Network
from disagg_jax.work import Step, StepLoad, Task, Transfer

Decoder = Callable[[int, int], float]  # (decodes, context tokens) -> seconds


class DeploymentCost(Protocol):
    """Durations of the work of one deployment, in seconds."""

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        """A step on each pipeline stage of an instance."""
        ...

    def decoder(self, instance: int) -> Decoder:
        """Where there is one stage: the same for a step of decodes only, but cheap."""
        ...

    def hop(self, transfer: Transfer) -> Hop:
        """How a transfer goes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCost:
    """step = fixed + per prompt token + per decode token + per context token read.

    The simplest `DeploymentCost` that shows interference, the same for all instances;
    every coefficient is in seconds. With all but `step_base_s` zero it is constant.
    """

    step_base_s: float  # of every step: launch, streaming the weights
    prefill_token_s: float = 0.0  # per prompt token computed
    decode_token_s: float = 0.0  # per request that decodes
    context_token_s: float = 0.0  # per cached token that a decode attends to
    transfer_base_s: float = 0.0  # latency of the link
    transfer_token_s: float = 0.0  # per token of KV moved
    transfer_parts: int = 1  # in which KV goes that leaves while it is computed
    # Pipeline stages of each instance, on each of which a step takes equally long; ()
    # is one each.
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
        return Hop(self.transfer_base_s + self.transfer_token_s * tokens, parts=parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelledCost:
    """A `DeploymentCost` of a cost model for the instances and a network between."""

    instances: tuple[InstanceCost, ...]  # in the deployment's order
    network: Network

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        return self.instances[instance].stages_s(load)

    def decoder(self, instance: int) -> Decoder:
        return self.instances[instance].decode_s

    def hop(self, transfer: Transfer) -> Hop:
        return self.network.hop(transfer)


@dataclasses.dataclass(frozen=True)
class CostExecutor:
    """An `Executor` that only says how long the work would take."""

    cost: DeploymentCost
    exact_block_placement: bool = False  # see `SimulatedDeployment`

    def run(self, work: Task) -> Outcome:
        if self.exact_block_placement:
            work = _placed(work)
        if isinstance(work, Transfer):
            hop = self.cost.hop(work)
            return Outcome(
                (hop.duration_s,) * hop.parts,
                bytes=hop.bytes,
                link=hop.link,
                shared=hop.shared,
            )
        if work.iterations > 1:
            return Outcome(self._span_s(work))
        stages_s = self.cost.stages_s(work.instance, work.load)
        return Outcome(stages_s[:1], later_stages_s=stages_s[1:])

    def _span_s(self, step: Step) -> Iterator[float]:
        decodes, context = step.load.decodes, step.load.context
        contexts = range(context, context + step.iterations * decodes, decodes)
        decode_s = self.cost.decoder(step.instance)
        return map(decode_s, itertools.repeat(decodes), contexts)


def _placed(work: Task) -> Task:
    """`work` with its blocks settled, as an engine does when it starts it."""
    if isinstance(work, Transfer):
        assert len(work.src_blocks) == len(work.dst_blocks)
        return work
    return dataclasses.replace(
        work, load=dataclasses.replace(work.load, pool_extent=work.pool_extent)
    )
