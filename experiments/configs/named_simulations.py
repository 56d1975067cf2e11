"""Named simulations: models, cost models, policies and links for `simulate` & co.

A simulation is everything but the deployment and the requests. To vary one:
`dataclasses.replace(get_simulation("opt13b_a100"), between="100gb")`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Mapping

from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.simdistserve import (
    NO_LIMIT,
    PrefillThenDecode,
    RoundRobinDecode,
)
from disagg_jax.sim.cost.distserve_profile import FittedProfile, profile_from_json
from disagg_jax.sim.cost.interface import CostModel
from disagg_jax.sim.cost.linear import ModelledCost
from disagg_jax.sim.cost.roofline import RooflineCost
from disagg_jax.sim.hardware.link import LINKS, get_link
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.workload.traces import Trace, load_trace, requests_from_trace
from experiments.configs.shapes import get_device, get_shape

PROFILES = pathlib.Path(__file__).parents[1] / "profiles"
DISTSERVE = PROFILES / "distserve_a100_opt.json"
_UNLIMITED_BLOCKS = 10**12
_POLICIES = {**SYSTEMS["vllm_v0"], **SYSTEMS["disaggregated"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """What `build` makes a simulated deployment of.

    Raises:
      ValueError: on an unknown model, cost model, hardware or link, or more streamed
        groups than layers.
    """

    model: str  # a name of `sim/model_shape.py`, or what else `shapes.get_shape` reads
    # "fitted/ENGINE" (DistServe's A100 coefficients) or "roofline/HARDWARE".
    cost: str
    # Another for colocated instances. A comparison across it compares engines too, so
    # whatever is printed of it is marked.
    colocated_cost: str | None = None
    policies: Mapping[Role, Policy] = dataclasses.field(
        default_factory=lambda: dict(_POLICIES)
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
    extra_tokens: int = 0  # generated beyond the output length that is asked for

    def __post_init__(self) -> None:
        layers, groups = get_shape(self.model).layers, self.streamed_groups
        expected = f"streamed_groups: expected 0 to {layers}, the model's layers"
        require(0 <= groups <= layers, expected, groups)
        for link in (self.inside, self.between):
            if link is not None:
                get_link(link)
        for cost in self.costs:
            cost_model(cost, self.model)

    @property
    def model_name(self) -> str:
        """To show: a model of a file has the file's name."""
        return get_shape(self.model).name

    @property
    def costs(self) -> tuple[str, ...]:
        """The cost models that are used."""
        return tuple(dict.fromkeys((self.cost, self.colocated_cost or self.cost)))

    @property
    def mark(self) -> str:
        """What to print beside every result: '' if all systems share a cost model."""
        if len(self.costs) == 1:
            return ""
        return f"unequal engines: colocated {self.costs[1]}, others {self.cost}"

    def cost_of(self, spec: InstanceSpec) -> CostModel:
        """The cost model of an instance."""
        colocated = spec.role is Role.COLOCATED and self.colocated_cost is not None
        return cost_model(self.costs[1] if colocated else self.cost, self.model)

    def memory_of(self, spec: InstanceSpec) -> KVMemory:
        """The KV memory of an instance.

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
        """Tokens of KV that fit beside the weights."""
        kind, _, name = self.cost.partition("/")
        if kind == "fitted":
            return distserve_profile().kv_tokens(self.model, spec.tp, spec.pp)
        shape, hardware = get_shape(self.model), get_device(name)
        return RooflineCost(model=shape, hardware=hardware).kv_tokens(spec.tp, spec.pp)

    def build(self, deployment: Deployment) -> SimulatedDeployment:
        """The simulated deployment.

        Raises:
          ValueError: if the model does not fit, or the cost model has no data for a tp,
            or KV is to be streamed and no instance sends any.
        """
        sends = self.streamed_groups == 0 or deployment.of(Role.PREFILL)
        expected = (
            f"streamed_groups: expected 0, as no instance of {deployment} sends KV"
        )
        require(bool(sends), expected, self.streamed_groups)
        shape = get_shape(self.model)
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
                    kv_bytes_per_token=shape.kv_bytes_per_token,
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


@functools.cache
def distserve_profile() -> FittedProfile:
    """DistServe's released A100 coefficients."""
    return profile_from_json(json.loads(DISTSERVE.read_text()))


@functools.cache
def cost_model(name: str, model: str) -> CostModel:
    """The cost model `name` ("fitted/distserve", "roofline/h100", ...) of `model`."""
    kind, _, rest = name.partition("/")
    kinds = "'fitted/ENGINE' or 'roofline/HARDWARE'"
    require(
        kind in ("fitted", "roofline") and rest != "", f"cost: expected {kinds}", name
    )
    if kind == "fitted":
        return distserve_profile().cost_model(rest, model)
    return RooflineCost(model=get_shape(model), hardware=get_device(rest))


def _simdistserve(model: str) -> Simulation:
    """DistServe's own simulator: free links, no KV memory, an engine for each side."""
    return Simulation(
        model=model,
        cost="fitted/distserve",
        colocated_cost="fitted/vllm",
        prefill_budget_is_memory=True,
        kv_memory=False,
        max_context=10**9,
        extra_tokens=1,
    )


SIMULATIONS = {
    "simdistserve_opt13b": _simdistserve("opt-13b"),
    "simdistserve_opt66b": _simdistserve("opt-66b"),
    # One engine for all systems, KV memory and links: what the comparison should be.
    "opt13b_a100": Simulation(
        model="opt-13b", cost="fitted/distserve", inside="nvlink-a100", between="25gb"
    ),
    "opt66b_a100": Simulation(
        model="opt-66b", cost="fitted/distserve", inside="nvlink-a100", between="25gb"
    ),
    "opt175b_a100": Simulation(
        model="opt-175b", cost="roofline/a100-80g", inside="nvlink-a100", between="25gb"
    ),
    "llama3_8b_h100": Simulation(
        model="llama-3-8b",
        cost="roofline/h100",
        inside="nvlink-h100",
        between="400gb",
        max_context=8192,
    ),
    "llama3_70b_h100": Simulation(
        model="llama-3-70b",
        cost="roofline/h100",
        inside="nvlink-h100",
        between="400gb",
        max_context=8192,
    ),
}


def get_simulation(name: str) -> Simulation:
    """The simulation called `name`."""
    require(name in SIMULATIONS, f"config: expected one of {sorted(SIMULATIONS)}", name)
    return SIMULATIONS[name]


def link_inside(hardware: str) -> str | None:
    """The link between two devices in a node; None if `hardware` has none."""
    link = get_device(hardware).hop.name
    return link if link in LINKS else None


def roofline_simulation(
    model: str, hardware: str, max_context: int = 2048
) -> Simulation:
    """A model on a device by a roofline; KV moves over the device's own link.

    Raises:
      ValueError: on an unknown name, or a device without such a link.
    """
    link = link_inside(hardware)
    expected = "hardware: expected a device with a link to others"
    require(link is not None, expected, hardware)
    return Simulation(
        model=model, cost=f"roofline/{hardware}", inside=link, max_context=max_context
    )


def trace_requests(
    trace: str | Trace, simulation: Simulation, rate_rps: float | None = None
) -> list[Request]:
    """The requests of a trace, with the tokens the simulation adds to each.

    Args:
      rate_rps: None keeps the trace's own times, which it must have then.
    """
    if not isinstance(trace, Trace):
        trace = load_trace(trace)
    if not trace.timed and rate_rps is None:
        raise ValueError(f"--rate: expected requests/s, as {trace.file} has no times")
    # What was to be done to ties is done.
    made = requests_from_trace(trace.rows, seed=0, rate_rps=rate_rps, ties="keep")
    if made.dropped_empty:
        print(f"{made.dropped_empty} rows without tokens are left out", file=sys.stderr)
    return [
        dataclasses.replace(r, max_tokens=r.max_tokens + simulation.extra_tokens)
        for r in made.requests
    ]
