"""What a deployment's work costs by a cost model, and an executor that only says so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from disagg_jax.control.backend import Outcome
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost, InstanceCost
from disagg_jax.sim.hardware.network import Hop, Network
from disagg_jax.work import Step, StepLoad, Task, Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelledCost:
    """A `DeploymentCost` of instances by a cost model and the network between them."""

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
    """An `Executor` that reports how long work would take, and does none."""

    cost: DeploymentCost

    def run(self, work: Task) -> Outcome:
        if isinstance(work, Transfer):
            hop = self.cost.hop(work)
            return Outcome(
                hop.parts_s,
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
