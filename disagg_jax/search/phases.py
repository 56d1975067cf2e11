"""The two phases of disaggregated serving, each simulated alone.

As in DistServe's Algorithm 1 (OSDI'24, section 4.1). Both are a pair of equal instances
in which one has nothing to do, so policies, memory and durations are those of a pair:

* prefill alone: every request has one output token, and so ends with its prefill;
* decode alone: prefill takes no time and has all the memory it wants, transfers take no
  time, so requests reach the decode side as they arrive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from disagg_jax.deployment import Deployment, InstanceSpec, Role
from disagg_jax.metrics import SLO
from disagg_jax.search.goodput import GoodputSearch
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad, Transfer

Build = Callable[[Deployment], SimulatedDeployment]
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
        return Hop(0.0)


def prefill_alone(
    build: Build, tp: int, pp: int, count: int, whole: GoodputSearch
) -> GoodputSearch:
    """`whole` for the prefill phase of `count` instances: the TTFT target only.

    Raises:
      ValueError: if the model does not fit on tp x pp devices.
    """
    return dataclasses.replace(
        whole,
        simulated=build(_equals(tp, pp, count)),
        workload=whole.workload.prompts_only(),
        slo=SLO(ttft_s=whole.slo.ttft_s, tpot_s=math.inf),
    )


def decode_alone(
    build: Build, tp: int, pp: int, count: int, whole: GoodputSearch
) -> GoodputSearch:
    """`whole` for the decode phase of `count` instances: the TPOT target only.

    Raises:
      ValueError: if the model does not fit on tp x pp devices.
    """
    simulated = build(_equals(tp, pp, count))
    prefill = frozenset(simulated.deployment.of(Role.PREFILL))
    memory = tuple(
        dataclasses.replace(pool, num_blocks=_NO_LIMIT) if i in prefill else pool
        for i, pool in enumerate(simulated.memory)
    )
    cost = DecodeAloneCost(cost=simulated.cost, free=prefill)
    return dataclasses.replace(
        whole,
        simulated=dataclasses.replace(simulated, memory=memory, cost=cost),
        slo=SLO(ttft_s=math.inf, tpot_s=whole.slo.tpot_s),
    )


def _equals(tp: int, pp: int, count: int) -> Deployment:
    """As many prefill as decode instances, all with the same parallelism."""
    roles = (Role.PREFILL, Role.DECODE)
    specs = (InstanceSpec(role=role, tp=tp, pp=pp) for role in roles)
    return Deployment(tuple(spec for spec in specs for _ in range(count)))
