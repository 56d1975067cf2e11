"""The two phases of disaggregated serving, each simulated alone.

As in DistServe's Algorithm 1 (OSDI'24, section 4.1). A phase is simulated on a pair of
equal instances of which one has no work, so policies, memory and durations are those of
a pair:

* prefill alone: every request has one output token, and so ends with its prefill;
* decode alone: prefill takes no time and has endless memory, and transfers take no
  time, so requests reach the decode side as they arrive.
"""

from __future__ import annotations

import dataclasses
import math

from disagg_jax.deployment import Role
from disagg_jax.metrics import SLO
from disagg_jax.search.goodput import GoodputSearch
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer

_NO_LIMIT = 10**12  # KV blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAloneCost:
    """A `DeploymentCost` in which prefill instances and transfers take no time."""

    cost: DeploymentCost
    free: frozenset[int]  # instances

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        stages_s = self.cost.stages_s(instance, load)
        return (0.0,) * len(stages_s) if instance in self.free else stages_s

    def decoder(self, instance: int) -> Decoder:
        return self.cost.decoder(instance)

    def hop(self, transfer: Transfer) -> Hop:
        return Hop((0.0,))


def prefill_alone(pair: GoodputSearch) -> GoodputSearch:
    """Restrict the search of a pair to its prefill phase: the TTFT target only."""
    return dataclasses.replace(
        pair,
        workload=pair.workload.prompts_only(),
        slo=SLO(ttft_s=pair.slo.ttft_s, tpot_s=math.inf),
    )


def decode_alone(pair: GoodputSearch) -> GoodputSearch:
    """Restrict the search of a pair to its decode phase: the TPOT target only."""
    simulated = pair.simulated
    prefill = frozenset(simulated.deployment.of(Role.PREFILL))
    memory = tuple(
        dataclasses.replace(pool, num_blocks=_NO_LIMIT) if i in prefill else pool
        for i, pool in enumerate(simulated.memory)
    )
    cost = DecodeAloneCost(cost=simulated.cost, free=prefill)
    return dataclasses.replace(
        pair,
        simulated=dataclasses.replace(simulated, memory=memory, cost=cost),
        slo=SLO(ttft_s=math.inf, tpot_s=pair.slo.tpot_s),
    )
