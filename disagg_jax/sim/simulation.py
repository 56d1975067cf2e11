"""A model, cost models, links and policies that simulate any deployment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.simdistserve import (
    NO_LIMIT,
    PrefillThenDecode,
    RoundRobinDecode,
)
from disagg_jax.sim.cost.deployment import ModelledCost
from disagg_jax.sim.cost.interface import CostModel
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from models.config import ModelConfig

_UNLIMITED_BLOCKS = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """Durations and KV capacity of one model on one kind of device."""

    name: str  # printed beside results, such as roofline/h100
    model: CostModel
    kv_tokens: Callable[[int, int], int]  # (tp, pp) -> tokens that fit beside weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """All of a simulation but its deployment and its requests.

    To vary one: `dataclasses.replace(simulation, between="100gb")`.

    Raises:
      ValueError: on an unknown link, or more streamed groups than layers.
    """

    model: ModelConfig
    cost: DeviceCost  # also gives the KV memory of colocated instances
    # Other durations for colocated instances. A comparison of them with other instances
    # compares engines too, so its results are marked.
    colocated_cost: DeviceCost | None = None
    policies: Mapping[Role, Policy] = dataclasses.field(
        default_factory=lambda: {**SYSTEMS["vllm_v0"], **SYSTEMS["disaggregated"]}
    )
    prefill_budget_is_memory: bool = False  # simdistserve: L_m is the KV capacity
    kv_memory: bool = True  # False: unlimited
    inside: str | None = None  # link inside a node; None takes no time
    between: str | None = None  # link between nodes; None: all is one node
    node_devices: int = 8
    # Layer groups in which KV leaves while its prompt is computed; 0: all of it after.
    streamed_groups: int = 0
    max_context: int = 2048  # of one request, in tokens
    block_tokens: int = 16
    extra_tokens: int = 0  # generated beyond the requested output length

    def __post_init__(self) -> None:
        layers, groups = self.model.layers, self.streamed_groups
        expected = f"streamed_groups: expected 0 to {layers}, the model's layers"
        require(0 <= groups <= layers, expected, groups)
        for link in (self.inside, self.between):
            if link is not None:
                get_link(link)

    @property
    def mark(self) -> str:
        """Return a warning to print with results; '' if systems share a cost model."""
        other = self.colocated_cost
        if other is None or other.name == self.cost.name:
            return ""
        return f"unequal engines: colocated {other.name}, others {self.cost.name}"

    def cost_of(self, spec: InstanceSpec) -> CostModel:
        """Return the cost model of an instance."""
        if spec.role is Role.COLOCATED and self.colocated_cost is not None:
            return self.colocated_cost.model
        return self.cost.model

    def memory_of(self, spec: InstanceSpec) -> KVMemory:
        """Return the KV memory of an instance.

        Raises:
          ValueError: if the model does not fit on it.
        """
        blocks = _UNLIMITED_BLOCKS
        if self.kv_memory:
            blocks = self.kv_tokens(spec) // self.block_tokens
        return KVMemory(
            num_blocks=blocks,
            block_tokens=self.block_tokens,
            max_context=self.max_context + self.extra_tokens,
        )

    def kv_tokens(self, spec: InstanceSpec) -> int:
        """Return the tokens of KV that fit on an instance beside the weights."""
        return self.cost.kv_tokens(spec.tp, spec.pp)

    def build(self, deployment: Deployment) -> SimulatedDeployment:
        """Return the simulated deployment.

        Raises:
          ValueError: if the model does not fit, or the cost model has no data for a tp,
            or KV is to be streamed and no instance sends any.
        """
        sends = self.streamed_groups == 0 or deployment.of(Role.PREFILL)
        expected = (
            f"streamed_groups: expected 0, as no instance of {deployment} sends KV"
        )
        require(bool(sends), expected, self.streamed_groups)
        return SimulatedDeployment(
            deployment=deployment,
            policies=self._policies(deployment),
            memory=tuple(self.memory_of(spec) for spec in deployment.instances),
            streams=self.streamed_groups > 0,
            cost=ModelledCost(
                instances=tuple(
                    self.cost_of(spec).instance(spec.tp, spec.pp)
                    for spec in deployment.instances
                ),
                network=Network(
                    deployment=deployment,
                    kv_bytes_per_token=self.model.kv_bytes_per_token,
                    inside=get_link(self.inside) if self.inside else None,
                    between=get_link(self.between) if self.between else None,
                    node_devices=self.node_devices,
                    layer_groups=max(1, self.streamed_groups),
                ),
            ),
        )

    def _policies(self, deployment: Deployment) -> Mapping[Role, Policy]:
        if not self.prefill_budget_is_memory:
            return self.policies
        entry = deployment.of(Role.PREFILL, Role.COLOCATED)[0]
        budget = self.kv_tokens(deployment.instances[entry])
        prefill = PrefillOnly(token_budget=budget, max_seqs=NO_LIMIT)
        return {
            Role.PREFILL: prefill,
            Role.DECODE: RoundRobinDecode(),
            Role.COLOCATED: PrefillThenDecode(prefill=prefill),
        }
