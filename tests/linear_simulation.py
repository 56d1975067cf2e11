"""A simulation with durations by hand: whose goodputs follow by arithmetic."""

import dataclasses

from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulation import DeviceCost, Simulation
from models.lookup import find_model


@dataclasses.dataclass(frozen=True)
class LinearInstance:
    cost: LinearCost

    def stages_s(self, load):
        # Of prompts alone there is no fixed part, so that they add up.
        base = self.cost.step_base_s if load.decodes else 0.0
        return (base + self.cost.prefill_token_s * load.prompt_tokens,)

    def decode_s(self, decodes, context):
        return self.cost.step_base_s


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Durations of one device; there is no tensor parallelism."""

    cost: LinearCost

    def instance(self, parallelism):
        if parallelism.tp > 1:
            raise ValueError(f"tp: expected 1, got {parallelism.tp}")
        return LinearInstance(self.cost)


# 1 ms a prompt token, 10 ms a decode step; free transfers, endless memory.
LINEAR = Simulation(
    model=find_model("opt-13b"),
    cost=DeviceCost(
        name="linear",
        instance=LinearModel(
            LinearCost(step_base_s=0.01, prefill_token_s=1e-3)
        ).instance,
        kv_tokens=lambda _: 10**6,
    ),
    kv_memory=False,
    max_context=10**6,
)
