"""Varies step times about a cost model's, as measured times vary."""

from __future__ import annotations

import dataclasses
import random

from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariedCost:
    """A `DeploymentCost` whose steps take a Gaussian factor longer or shorter.

    The factor belongs to the load: equal loads take equally long at equal seeds, on all
    stages and under every policy. Transfers do not vary.

    Raises:
      ValueError: if `deviation` is below 0.
    """

    cost: DeploymentCost
    deviation: float  # standard deviation of the factor, which is 1 on average
    seed: int

    def __post_init__(self) -> None:
        require(self.deviation >= 0, "deviation: expected >= 0", self.deviation)

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        factor = self._factor(load)
        return tuple(factor * s for s in self.cost.stages_s(instance, load))

    def decoder(self, instance: int) -> Decoder:
        def decode_s(decodes: int, context: int) -> float:
            return self.stages_s(instance, StepLoad((), decodes, context))[0]

        return decode_s

    def hop(self, transfer: Transfer) -> Hop:
        return self.cost.hop(transfer)

    def _factor(self, load: StepLoad) -> float:
        """Draw a factor, seeded with the load: order and process do not matter."""
        rng = random.Random(f"{self.seed} {load}")
        return max(0.0, rng.gauss(1.0, self.deviation))
