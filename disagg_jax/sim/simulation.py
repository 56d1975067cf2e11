"""A model, cost models, links, policies and routers that simulate any deployment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.programs import Buckets
from disagg_jax.scheduling import SYSTEMS, get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.routing import get_router
from disagg_jax.scheduling.simdistserve import (
    NO_LIMIT,
    PrefillThenDecode,
    RoundRobinDecode,
)
from disagg_jax.scheduling.tuning import replicated
from disagg_jax.sim.cost.deployment import ModelledCost
from disagg_jax.sim.cost.interface import DeploymentCost
from disagg_jax.sim.device_cost import COST_MODELS, DeviceCost, MakeCost, get_cost
from disagg_jax.sim.engines import EngineProfile, get_engine
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.hardware.presets import get_hardware
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from models.config import ModelConfig
from models.lookup import find_model

_UNLIMITED_BLOCKS = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """All of a simulation but its deployment and its requests.

    `Simulation.of` makes one by names. To vary one:
    `dataclasses.replace(simulation, between="100gb")`.

    Raises:
      ValueError: on an unknown link or router, or more streamed groups than layers; or
        on a link, streamed groups or another cost model beside a profile.
    """

    model: ModelConfig
    cost: DeviceCost  # also gives the KV memory of colocated instances
    # Other durations for colocated instances. A comparison of them with other instances
    # compares engines too, so its results are marked.
    colocated_cost: DeviceCost | None = None
    # Other devices for prefill instances; also gives their KV memory.
    prefill_cost: DeviceCost | None = None
    # Of a cost model with an engine, the limits are those of an attention replica.
    policies: Mapping[Role, Policy] = dataclasses.field(
        default_factory=lambda: {**SYSTEMS["vllm_v0"], **SYSTEMS["disaggregated"]}
    )
    prefill_router: str = "shortest_queue"  # see `get_router`
    decode_router: str = "least_loaded"
    prefill_budget_is_memory: bool = False  # simdistserve: L_m is the KV capacity
    kv_memory: bool = True  # False: unlimited
    # Links are names of `get_link`, or None. Inside a node None takes no time. With a
    # profile, which has transfers of its own, both are None.
    inside: str | None = None
    between: str | None = None  # between nodes; None: all is one node
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
        for router in (self.prefill_router, self.decode_router):
            get_router(router)
        if self.cost.profile is not None:
            self._check_profile()

    def _check_profile(self) -> None:
        who, groups = self.cost.name, self.streamed_groups
        links = [link for link in (self.inside, self.between) if link is not None]
        require(not links, f"link: expected none, as {who} has transfers", links)
        expected = f"streamed_groups: expected 0, as {who} has whole transfers"
        require(groups == 0, expected, groups)
        others = [c.name for c in (self.colocated_cost, self.prefill_cost) if c]
        require(not others, f"cost: expected {who} for all instances", others)

    @classmethod
    def of(
        cls,
        model: str,
        hardware: str,
        *,
        system: str | None = None,
        engine: str | None = None,
        cost: str = "roofline",
        costs: Mapping[str, MakeCost] = COST_MODELS,
        **fields: Any,
    ) -> Simulation:
        """Simulate a named model on named devices; KV moves over the devices' own link.

        Args:
          model: of `find_model`: a preset, a .json file such as a Hugging Face
            config.json, or `module:attribute`.
          hardware: of `get_hardware`: a preset or a .json file.
          system: of `get_system`; by default the engine's, or else vLLM's policy for
            colocated instances, and DistServe's for others. With an engine it has the
            engine's limits.
          engine: of `get_engine`: whose overheads and limits the instances have.
          cost: of `get_cost`, which looks in `costs`. With a profile, blocks have the
            tokens that it has.
          fields: other fields, such as `max_context=8192`.

        Raises:
          ValueError: on an unknown name.
        """
        found, device = find_model(model), get_hardware(hardware)
        profile = None if engine is None else get_engine(engine)
        named: dict[str, Mapping[Role, Policy]] = {}
        if system is not None:
            policies = get_system(system)
            named["policies"] = profile.limit(policies) if profile else policies
        elif profile is not None and "policies" not in fields:
            named["policies"] = profile.policies
        made = get_cost(cost, found, device, costs, profile)
        if made.profile is None:
            fields.setdefault("inside", device.hop.name)
        else:
            fields.setdefault("block_tokens", made.profile.block_tokens)
        return cls(model=found, cost=made, **named, **fields)

    def over(self, link: str) -> Simulation:
        """Return the simulation in which all KV takes `link`, also between nodes.

        Args:
          link: of `get_link`: a preset or a .json file.

        Raises:
          ValueError: on an unknown link.
        """
        return dataclasses.replace(self, inside=link, between=None)

    @property
    def engine(self) -> EngineProfile | None:
        """Return the profile whose overheads and limits the instances have."""
        return self.cost.engine

    @property
    def checked(self) -> str:
        """Say how far its durations were from measurements, to print with results.

        It has a line for each cost model that says something, and none twice.
        """
        costs = (self.cost, self.colocated_cost, self.prefill_cost)
        said = dict.fromkeys(cost.checked for cost in costs if cost is not None)
        return "\n".join(filter(None, said))

    @property
    def mark(self) -> str:
        """Return a warning to print with results; '' if systems share a cost model."""
        other = self.colocated_cost
        if other is None or other.name == self.cost.name:
            return ""
        return f"unequal engines: colocated {other.name}, others {self.cost.name}"

    @property
    def wires(self) -> str:
        """Say what KV moves over inside a node, to print with results."""
        if self.cost.profile is not None:
            return "the links of its profile"
        return self.inside or "a free link"

    def cost_of(self, spec: InstanceSpec) -> DeviceCost:
        """Return the cost model of an instance."""
        if spec.role is Role.COLOCATED and self.colocated_cost is not None:
            return self.colocated_cost
        return self._devices_of(spec)

    def _devices_of(self, spec: InstanceSpec) -> DeviceCost:
        if spec.role is Role.PREFILL and self.prefill_cost is not None:
            return self.prefill_cost
        return self.cost

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

    def replicas(self, spec: InstanceSpec) -> int:
        """Return how many times an instance has the limits of its policy.

        An engine's limits are those of each attention replica. Without an engine they
        are the instance's.
        """
        return spec.parallelism.dp if self.cost_of(spec).engine else 1

    def kv_tokens(self, spec: InstanceSpec) -> int:
        """Return the tokens of KV that fit on an instance beside the weights."""
        return self._devices_of(spec).kv_tokens(spec.parallelism)

    def build(self, deployment: Deployment | str) -> SimulatedDeployment:
        """Return the simulated deployment.

        Args:
          deployment: or the text that `Deployment.parse` reads.

        Raises:
          ValueError: if the model does not fit, or the cost model has no data for a tp,
            or a profile has none of a kind of step, or KV is to be streamed and no
            instance sends any, or with an engine the instances of a role have unequal
            dp.
        """
        if isinstance(deployment, str):
            deployment = Deployment.parse(deployment)
        sends = self.streamed_groups == 0 or deployment.of(Role.PREFILL)
        expected = (
            f"streamed_groups: expected 0, as no instance of {deployment} sends KV"
        )
        require(bool(sends), expected, self.streamed_groups)
        policies = self._policies(deployment)
        memory = tuple(self.memory_of(spec) for spec in deployment.instances)
        return SimulatedDeployment(
            deployment=deployment,
            policies=policies,
            memory=memory,
            prefill_router=get_router(self.prefill_router),
            decode_router=get_router(self.decode_router),
            streams=self.streamed_groups > 0,
            cost=self._durations(deployment, policies, memory),
        )

    def _durations(
        self,
        deployment: Deployment,
        policies: Mapping[Role, Policy],
        memory: Sequence[KVMemory],
    ) -> DeploymentCost:
        instances, profile = deployment.instances, self.cost.profile
        if profile is not None:
            limits = [policies[spec.role].limits for spec in instances]
            buckets = list(map(Buckets.for_limits, limits, memory))
            return profile.cost(deployment, buckets, memory)
        return ModelledCost(
            instances=tuple(
                self.cost_of(spec).instance(spec.parallelism) for spec in instances
            ),
            network=Network(
                deployment=deployment,
                kv_bytes_per_token=self.model.kv_bytes_per_token,
                inside=get_link(self.inside) if self.inside else None,
                between=get_link(self.between) if self.between else None,
                node_devices=self.node_devices,
                layer_groups=max(1, self.streamed_groups),
            ),
        )

    def _policies(self, deployment: Deployment) -> Mapping[Role, Policy]:
        if not self.prefill_budget_is_memory:
            return {
                role: self._on_replicas(role, policy, deployment)
                for role, policy in self.policies.items()
            }
        entry = deployment.of(Role.PREFILL, Role.COLOCATED)[0]
        budget = self.kv_tokens(deployment.instances[entry])
        prefill = PrefillOnly(token_budget=budget, max_seqs=NO_LIMIT)
        return {
            Role.PREFILL: prefill,
            Role.DECODE: RoundRobinDecode(),
            Role.COLOCATED: PrefillThenDecode(prefill=prefill),
        }

    def _on_replicas(
        self, role: Role, policy: Policy, deployment: Deployment
    ) -> Policy:
        instances = [deployment.instances[i] for i in deployment.of(role)]
        counts = {self.replicas(spec) for spec in instances}
        equal = f"dp: with an engine expected {role} instances of equal dp"
        require(len(counts) <= 1, equal, str(deployment))
        return policy if counts <= {1} else replicated(policy, *counts)
