"""The seconds of an engine's programs, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from disagg_jax.programs.buckets import Buckets
from disagg_jax.programs.shapes import StepShape
from disagg_jax.sim.cost.interface import Decoder
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramTimes:
    """A `DeploymentCost` that rounds work to an engine's programs, and looks them up.

    It is exact where steps tell the KV blocks that their decodes attend to
    (`SimulatedDeployment.counts_blocks`).

    Attributes:
      buckets: the shapes that each instance has programs for.
      block_tokens: of each instance.
      steps: of each instance, by the shape of the step: seconds on each stage.
      transfers: by source, destination, blocks with padding, and whether the KV leaves
        while its prompt is computed.
    """

    buckets: Sequence[Buckets]
    block_tokens: Sequence[int]
    steps: Sequence[Mapping[StepShape, tuple[float, ...]]]
    transfers: Mapping[tuple[int, int, int, bool], Hop]

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        size = self.block_tokens[instance]
        return self.steps[instance][self.buckets[instance].load_shape(load, size)]

    def decoder(self, instance: int) -> Decoder:
        return lambda decodes, context: self.stages_s(
            instance, StepLoad((), decodes, context)
        )[0]

    def hop(self, transfer: Transfer) -> Hop:
        size = self.buckets[transfer.src].transfer_size(len(transfer.src_blocks))
        key = (transfer.src, transfer.dst, size, transfer.step > 0)
        return self.transfers[key]
