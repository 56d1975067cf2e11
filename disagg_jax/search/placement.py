"""Which deployment serves the most requests on given devices.

DistServe's two placement algorithms (OSDI'24, section 4), and a joint search in which
colocated systems take part, so that the answer can be not to disaggregate:

* high affinity (Algorithm 1; KV moves fast between any two devices): the best layout
  of each phase alone, then replicas of both in balance;
* low affinity (Algorithm 2; KV moves inside a node): pairs of a prefill and a decode
  instance with equally many stages across nodes, simulated together, then replicated;
* joint: any numbers of both, simulated together, and colocated instances.

All of them search their candidates best first (`candidates.best_first`). A candidate
that cannot win even by the bound of its phases is not simulated.

A phase alone waits less than in a pair, but its arrivals differ (prefill smooths or
bunches them), and pooled instances do better than one alone: the bound of a pool is an
estimate for instances that are always busy. So bounds are widened by a margin, and
pruning is as safe as the margin; tests/search/test_placement.py compares it with
exhaustive search.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, InstanceSpec, Parallelism, Role
from disagg_jax.errors import require
from disagg_jax.metrics import SLO, Interval, margin
from disagg_jax.progress import Progress, Stop, never
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.interface import Policy
from disagg_jax.search.candidates import (
    Candidate,
    CandidateResult,
    best_first,
    candidate_row,
)
from disagg_jax.search.goodput import GoodputSearch
from disagg_jax.search.phases import decode_alone, prefill_alone
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.simulation import Simulation
from disagg_jax.sim.workers import Mapper
from disagg_jax.workload import Workload

Build = Callable[[Deployment], SimulatedDeployment]
ALGORITHMS = ("high", "low", "joint")
# Only searched when asked for: chunked prefill is for KV that leaves while it is
# computed, and here it leaves afterwards; where memory is not short, TensorRT-LLM's
# policy plans the steps of Sarathi-Serve.
LEFT_OUT = ("disaggregated_chunked", "tensorrt_llm")
PLACED = {name: system for name, system in SYSTEMS.items() if name not in LEFT_OUT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementProblem:
    """Devices, requests and targets, and how deployments are simulated.

    Attributes:
      apart: simulates a deployment of each system of prefill and decode instances;
        raises ValueError if a model does not fit.
      colocated: the same of each colocated system.
      layouts: to choose from, for each instance.
      rate_rps: to serve with as many replicas as it takes: goodput counts per device
        used. Without a rate all `devices` count, also the ones left over.
      num_requests: of a run for up to `node_devices` devices; twice as many for up to
        twice the devices, and so on, since short runs end before a backlog hurts.
        Smaller deployments so run longer, and their goodputs are more cautious.
      margin: relative; widens the bounds.
      checked: how far durations were from measurements, in words.
    """

    apart: Mapping[str, Build]
    colocated: Mapping[str, Build]
    layouts: tuple[Parallelism, ...]
    devices: int
    rate_rps: float | None = None
    node_devices: int = 8
    workload: Workload
    slo: SLO
    plan: SearchPlan = SearchPlan(growth=1.25, tolerance=0.05, max_rates=30)
    num_requests: int = 1000
    seeds: tuple[int, ...] = (0,)
    margin: float = 0.1
    checked: str = ""

    @classmethod
    def of(
        cls,
        simulation: Simulation,
        devices: int,
        systems: Mapping[str, Mapping[Role, Policy]] = PLACED,
        **fields: Any,
    ) -> PlacementProblem:
        """Place the model of a simulation on `devices` devices.

        Layouts have tp inside a node and a pp that divides the layers, as in
        DistServe's own search.

        Args:
          systems: any number of either kind. The colocated ones take part in the joint
            search.
          fields: other fields of the problem.
        """

        def builds(*, colocated: bool) -> dict[str, Build]:
            return {
                name: dataclasses.replace(simulation, policies=policies).build
                for name, policies in systems.items()
                if (Role.COLOCATED in policies) == colocated
            }

        nodes = simulation.node_devices
        return cls(
            apart=builds(colocated=False),
            colocated=builds(colocated=True),
            layouts=layouts_of(simulation.model.layers, devices, nodes),
            devices=devices,
            node_devices=nodes,
            checked=simulation.checked,
            **fields,
        )

    def __post_init__(self) -> None:
        require(self.devices >= 1, "devices: expected >= 1", self.devices)
        systems = [*self.apart, *self.colocated]
        require(len(systems) > 0, "systems: expected at least one", systems)
        require(self.margin >= 0, "margin: expected >= 0", self.margin)
        rate = self.rate_rps
        finite = rate is None or 0 < rate < math.inf
        require(finite, "rate_rps: expected > 0, and finite", rate)

    def build(self, system: str, deployment: Deployment) -> SimulatedDeployment:
        """Return a system on a deployment, simulated."""
        return {**self.apart, **self.colocated}[system](deployment)

    def named(self, system: str, deployment: object) -> str:
        """Return the name of a candidate: with its system, if several are apart."""
        several = len(self.apart) > 1 or system in self.colocated
        return f"{system} {deployment}" if several else f"{deployment}"

    def copies(self, devices: int, nodes: int | None = None) -> int:
        """Return how many groups of `devices` fit, each inside `nodes` if given."""
        if nodes is None or self.devices < self.node_devices:
            return self.devices // devices
        room = nodes * self.node_devices
        return self.devices // room * (room // devices)

    def share(self, devices: int, copies: int) -> float:
        """Return the divisor of the goodput of one of the copies."""
        return devices if self.rate_rps is not None else self.devices / copies

    def ask(self, simulated: SimulatedDeployment, devices: int) -> GoodputSearch:
        """Return the search for a deployment's goodput."""
        return GoodputSearch(
            simulated=simulated,
            workload=self.workload,
            slo=self.slo,
            plan=self.plan,
            num_requests=self.num_requests * math.ceil(devices / self.node_devices),
            seeds=self.seeds,
        )

    def feasible(self) -> tuple[tuple[Parallelism, ...], dict[Parallelism, str]]:
        """Return the layouts that fit on the devices, and why the others do not."""
        skipped: dict[Parallelism, str] = {}
        for layout in self.layouts:
            try:
                expected = f"{layout}: expected at most {self.devices} devices"
                require(layout.devices <= self.devices, expected, layout.devices)
                for build in self.apart.values():
                    build(pair(layout, layout))
                for build in self.colocated.values():
                    build(colocated_instances(layout))
            except ValueError as error:
                skipped[layout] = str(error)
        kept = tuple(layout for layout in self.layouts if layout not in skipped)
        return kept, skipped


def layouts_of(layers: int, devices: int, node_devices: int) -> tuple[Parallelism, ...]:
    """Return every tp inside a node with every pp that divides the layers."""
    return tuple(
        Parallelism(tp, pp)
        for tp in range(1, min(devices, node_devices) + 1)
        for pp in range(1, devices // tp + 1)
        if layers % pp == 0
    )


def pair(
    prefill: Parallelism, decode: Parallelism, num_prefill: int = 1, num_decode: int = 1
) -> Deployment:
    """Return a deployment of prefill and decode instances."""
    return Deployment(
        (InstanceSpec(role=Role.PREFILL, parallelism=prefill),) * num_prefill
        + (InstanceSpec(role=Role.DECODE, parallelism=decode),) * num_decode
    )


def colocated_instances(layout: Parallelism, count: int = 1) -> Deployment:
    """Return a deployment of equal colocated instances."""
    instance = InstanceSpec(role=Role.COLOCATED, parallelism=layout)
    return Deployment((instance,) * count)


# ---- phases, and Algorithm 1 ---------------------------------------------------------


def phase_candidates(
    problem: PlacementProblem, system: str, layouts: Sequence[Parallelism], role: Role
) -> list[Candidate]:
    """Return one phase of a system alone, on an instance of each layout."""
    alone = prefill_alone if role is Role.PREFILL else decode_alone
    return [
        Candidate(
            name=problem.named(system, InstanceSpec(role=role, parallelism=layout)),
            search=alone(problem.ask(simulated, layout.devices)),
            devices=layout.devices,
            layout=layout,
            system=system,
        )
        for layout in layouts
        for simulated in [problem.build(system, pair(layout, layout))]
    ]


def replicas(
    prefill: CandidateResult,
    decode: CandidateResult,
    *,
    devices: int | None = None,
    rate_rps: float | None = None,
) -> tuple[int, int]:
    """Return the numbers of prefill and decode instances: Algorithm 1's last step.

    Args:
      devices: without a rate: return the numbers that fit with the highest min(n
        goodput_p, m goodput_d), and among these the fewest devices; (0, 0) if not even
        one of each fits.
      rate_rps: return the fewest instances that serve this rate.
    """
    rates = (prefill.rps, decode.rps)
    require(min(rates) > 0, "replicas: expected a goodput > 0 of both phases", rates)
    sizes = (prefill.candidate.devices, decode.candidate.devices)
    if rate_rps is not None:
        return math.ceil(rate_rps / rates[0]), math.ceil(rate_rps / rates[1])
    fitting = [(0, 0)]
    for n in range(1, int((devices or 0) // sizes[0]) + 1):
        left = (devices or 0) - n * sizes[0]
        fitting += [(n, m) for m in range(1, int(left // sizes[1]) + 1)]

    def quality(counts: tuple[int, int]) -> tuple[float, float]:
        served = min(counts[0] * rates[0], counts[1] * rates[1])
        return served, -(counts[0] * sizes[0] + counts[1] * sizes[1])

    return max(fitting, key=quality)


# ---- Algorithm 2, and the joint search -----------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRates:
    """The rates of one instance by the search of a phase, in requests/s."""

    bound_rps: float  # its goodput is at most this
    about_rps: float  # its goodput, or an estimate
    pooled_rps: float  # an instance of a pool adds at most this: pools share queues


Phases = tuple[Mapping[Parallelism, PhaseRates], Mapping[Parallelism, PhaseRates]]


def phase_rates(results: Sequence[CandidateResult]) -> dict[Parallelism, PhaseRates]:
    """Return the rates of a phase by layout."""
    return {
        result.candidate.layout: PhaseRates(
            bound_rps=result.at_most_rps,
            pooled_rps=_pooled_rps(result),
            about_rps=result.goodput.rps
            if result.goodput is not None and result.won
            else min(result.at_most_rps, result.candidate.search.first_rps()),
        )
        for result in results
        if result.candidate.layout is not None
    }


def _pooled_rps(result: CandidateResult) -> float:
    """Return the rate at which requests meeting the target alone saturate it."""
    search = result.candidate.search
    return max(result.at_most_rps, search.capacity_rps() / search.plan.target)


def low_affinity_candidates(
    problem: PlacementProblem,
    system: str,
    layouts: Sequence[Parallelism],
    phases: Phases,
) -> list[Candidate]:
    """Return pairs that share their nodes: Algorithm 2.

    Both instances spread their stages over the same number of nodes, and equal stages
    lie together, so that each node holds at most `node_devices`.
    """
    found: dict[str, Candidate] = {}
    for nodes in range(1, max(1, problem.devices // problem.node_devices) + 1):
        room = min(problem.devices, problem.node_devices)
        for p, d in itertools.product(layouts, repeat=2):
            spread = p.pp % nodes == 0 and d.pp % nodes == 0
            if spread and p.devices + d.devices <= nodes * room:
                candidate = _unit(problem, system, phases, (p, 1), (d, 1), nodes)
                found.setdefault(candidate.name, candidate)
    return list(found.values())


def joint_candidates(
    problem: PlacementProblem,
    system: str,
    layouts: Sequence[Parallelism],
    phases: Phases,
) -> list[Candidate]:
    """Return any numbers of two kinds of instances.

    Multiples of another unit are left out: they are the same instances, pooled.
    """
    return [
        _unit(problem, system, phases, (p, n), (d, m))
        for p, d in itertools.product(layouts, repeat=2)
        for n, m in _counts(problem.devices, p.devices, d.devices)
    ]


def colocated_candidates(
    problem: PlacementProblem, layouts: Sequence[Parallelism]
) -> list[Candidate]:
    """Return one instance of each colocated system and layout, replicated."""
    return [
        Candidate(
            name=problem.named(system, unit),
            search=problem.ask(build(unit), unit.devices),
            devices=problem.share(unit.devices, copies),
            copies=copies,
            system=system,
        )
        for system, build in problem.colocated.items()
        for layout in layouts
        for unit in [colocated_instances(layout)]
        for copies in [problem.copies(unit.devices)]
    ]


def _counts(devices: int, prefill: int, decode: int) -> Iterator[tuple[int, int]]:
    for n in range(1, devices // prefill + 1):
        for m in range(1, (devices - n * prefill) // decode + 1):
            if math.gcd(n, m) == 1:
                yield n, m


def _unit(
    problem: PlacementProblem,
    system: str,
    phases: Phases,
    prefill: tuple[Parallelism, int],
    decode: tuple[Parallelism, int],
    nodes: int | None = None,
) -> Candidate:
    (p, n), (d, m) = prefill, decode
    unit = pair(p, d, n, m)
    rates = phases[0][p], phases[1][d]
    about = min(n * rates[0].about_rps, m * rates[1].about_rps)
    bound = min(_bound_rps(rates[0], n), _bound_rps(rates[1], m))
    asked = problem.ask(problem.build(system, unit), unit.devices)
    copies = problem.copies(unit.devices, nodes)
    return Candidate(
        name=problem.named(system, unit),
        search=dataclasses.replace(asked, start_rps=about or None),
        devices=problem.share(unit.devices, copies),
        copies=copies,
        bound_rps=bound * (1 + problem.margin),
        system=system,
    )


def _bound_rps(rates: PhaseRates, count: int) -> float:
    return rates.bound_rps if count == 1 else count * rates.pooled_rps


# ---- the algorithms of a problem -----------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementSearch:
    """Runs placement algorithms on a problem."""

    problem: PlacementProblem
    mapper: Mapper
    progress: Progress
    prune: bool = True
    # Also simulate answers as a whole: Algorithm 1's, and copies of a unit as one.
    whole: bool = False
    stop: Stop = never  # whether the time is spent: candidates are left out then

    def run(self, algorithms: Sequence[str]) -> dict[str, Any]:
        """Return the tables and winners of some of `ALGORITHMS`, ready for JSON.

        Raises:
          ValueError: if no layout fits, or no candidate meets the targets.
        """
        layouts, skipped = self.problem.feasible()
        reasons = "; ".join(reasons_of({str(k): why for k, why in skipped.items()}))
        fits = "layouts: expected at least one that fits"
        require(len(layouts) > 0, f"{fits} ({reasons})", "none")
        found: dict[str, Any] = {
            "checked": self.problem.checked,
            "skipped": {str(k): v for k, v in skipped.items()},
        }
        least = min(layout.devices for layout in layouts)
        room = self.problem.devices - least  # what the other phase leaves
        paired = [layout for layout in layouts if layout.devices <= room]
        systems = list(self.problem.apart)
        if not systems:
            only = (
                f"algorithms: expected joint, as none of {list(self.problem.colocated)}"
            )
            require(
                list(algorithms) == ["joint"], f"{only} is disaggregated", algorithms
            )
        # The joint search needs good bounds, so its phases are searched in full.
        prune = self.prune and "joint" not in algorithms
        prefill, decode = (
            {system: self._phase(system, role, paired, prune) for system in systems}
            for role in (Role.PREFILL, Role.DECODE)
        )
        searched = sum(map(len, [*prefill.values(), *decode.values()]))
        found["left_out"] = 2 * len(paired) * len(systems) - searched
        if "high" in algorithms:
            found["high"] = self._high(_ranked(prefill), _ranked(decode))
        makers = {"low": low_affinity_candidates, "joint": joint_candidates}
        for name in [name for name in makers if name in algorithms]:
            units = list[Candidate]()
            for system in systems:
                phases = phase_rates(prefill[system]), phase_rates(decode[system])
                known = [k for k in paired if all(k in rates for rates in phases)]
                units += makers[name](self.problem, system, known, phases)
            if name == "joint":
                units += colocated_candidates(self.problem, layouts)
            found[name] = self._units(name, units)
        return found

    def _phase(
        self, system: str, role: Role, layouts: Sequence[Parallelism], prune: bool
    ) -> list[CandidateResult]:
        candidates = phase_candidates(self.problem, system, layouts, role)
        name = self.problem.named(system, f"{role} alone")
        results = self._best(name, candidates, prune)
        if results:
            _require_reachable(results, name)
        return results

    def _best(
        self, name: str, candidates: Sequence[Candidate], prune: bool
    ) -> list[CandidateResult]:
        return best_first(
            candidates,
            self.mapper,
            self.progress,
            part=name,
            prune=prune,
            stop=self.stop,
        )

    def _high(
        self, prefill: Sequence[CandidateResult], decode: Sequence[CandidateResult]
    ) -> dict[str, Any]:
        p, d = self._fitting(prefill, decode)
        n, m = replicas(
            p, d, devices=self.problem.devices, rate_rps=self.problem.rate_rps
        )
        devices = int(n * p.candidate.devices + m * d.candidate.devices)
        served = min(n * p.rps, m * d.rps)
        counted = zip((n, m), _specs(p, d), strict=True)
        deployment = ",".join(f"{count}x{spec}" for count, spec in counted)
        system = p.candidate.system
        return {
            "winner": self.problem.named(system, deployment),
            "system": system,
            "deployment": deployment,
            "devices": devices,
            "goodput_rps": served,
            "goodput_per_device_rps": served / devices,
            "prefill": [candidate_row(result) for result in prefill],
            "decode": [candidate_row(result) for result in decode],
            "as a whole": self._as_a_whole((p, n), (d, m), served),
        }

    def _as_a_whole(
        self,
        prefill: tuple[CandidateResult, int],
        decode: tuple[CandidateResult, int],
        served: float,
    ) -> list[dict[str, Any]]:
        """Simulate all instances together, which Algorithm 1 does not do."""
        (p, n), (d, m) = prefill, decode
        if not self.whole:
            return []
        first, last = _specs(p, d)
        unit = Deployment((first,) * n + (last,) * m)
        system = p.candidate.system
        asked = self.problem.ask(self.problem.build(system, unit), unit.devices)
        candidate = Candidate(
            name=self.problem.named(system, unit),
            search=dataclasses.replace(asked, start_rps=served),
            devices=unit.devices,
        )
        return [
            candidate_row(result) for result in self._best("whole", [candidate], False)
        ]

    def _fitting(
        self, prefill: Sequence[CandidateResult], decode: Sequence[CandidateResult]
    ) -> tuple[CandidateResult, CandidateResult]:
        """Return the best instance of each phase, among pairs that fit together.

        Both are of one system.
        """
        room = math.inf if self.problem.rate_rps else self.problem.devices
        pairs = [
            (p, d)
            for p in prefill
            for d in decode
            if p.candidate.system == d.candidate.system
            if p.won and d.won and p.candidate.devices + d.candidate.devices <= room
        ]
        expected = "high: expected devices for the best layout of each phase"
        require(len(pairs) > 0, expected, self.problem.devices)
        return max(pairs, key=lambda pair: min(o.per_device_rps for o in pair))

    def _units(self, name: str, units: Sequence[Candidate]) -> dict[str, Any]:
        expected = f"{name}: expected devices for a prefill and a decode instance"
        require(len(units) > 0, expected, self.problem.devices)
        results = self._best(name, units, self.prune)
        _require_reachable(results, name)
        best = results[0]
        unit = best.candidate.search.simulated.deployment
        system = best.candidate.system
        copies = best.candidate.copies
        if self.problem.rate_rps is not None:
            copies = math.ceil(self.problem.rate_rps / best.rps)
        return {
            "winner": best.candidate.name,
            "system": system,
            "deployment": str(Deployment(copies * unit.instances)),
            "copies": copies,
            "devices": copies * unit.devices,
            "goodput_rps": copies * best.rps,
            "goodput_per_device_rps": best.per_device_rps,
            "candidates": [candidate_row(result) for result in results],
            "left_out": len(units) - len(results),
            "as_one": self._as_one(best, system, copies),
        }

    def _as_one(
        self, best: CandidateResult, system: str, copies: int
    ) -> dict[str, Any] | None:
        """Simulate copies of a unit as one deployment, with all instances in one pool.

        KV moves between any two of them then. The ratio to the copies is paired by
        seed.
        """
        if not self.whole or copies == 1 or self.stop():
            return None
        unit = best.candidate.search.simulated.deployment
        pool = Deployment(_pooled(copies * unit.instances))
        asked = self.problem.ask(self.problem.build(system, pool), pool.devices)
        search = dataclasses.replace(asked, start_rps=copies * best.rps)
        candidate = Candidate(name=str(pool), search=search, devices=pool.devices)
        (found,) = self._best("as one", [candidate], False)
        over = _over_copies(found, best, copies)
        return {
            **candidate_row(found),
            "over_copies": over and dataclasses.asdict(over),
        }


def _ranked(
    by_system: Mapping[str, Sequence[CandidateResult]],
) -> list[CandidateResult]:
    """Return the results of all systems, the best first."""
    results = itertools.chain(*by_system.values())
    return sorted(results, key=lambda result: -result.per_device_rps)


def _specs(
    prefill: CandidateResult, decode: CandidateResult
) -> tuple[InstanceSpec, InstanceSpec]:
    """Return the instances of which each phase was searched alone."""
    deployments = (
        result.candidate.search.simulated.deployment for result in (prefill, decode)
    )
    first, last = (each.instances for each in deployments)
    return first[0], last[-1]


def _pooled(instances: Sequence[InstanceSpec]) -> tuple[InstanceSpec, ...]:
    """Return prefill instances before decode instances, so that equal ones are one."""
    return tuple(sorted(instances, key=lambda spec: spec.role is Role.DECODE))


def _over_copies(
    one: CandidateResult, unit: CandidateResult, copies: int
) -> Interval | None:
    """Return the goodput of one deployment over that of the copies of a unit."""
    if one.goodput is None or unit.goodput is None:
        return None
    copied = [copies * rps for rps in unit.goodput.found.per_seed_rps]
    independent = not one.candidate.search.why_dependent
    ours = one.goodput.found.per_seed_rps
    return margin(ours, copied, independent=independent).ratio


def _require_reachable(results: Sequence[CandidateResult], name: str) -> None:
    """Raise a ValueError if no candidate can meet the targets."""
    if results[0].won:
        return
    scales = {
        result.goodput.unloaded_scale: result.candidate.name
        for result in results
        if result.goodput is not None
    }
    scale = min(scales)
    raise ValueError(
        f"slo: expected targets that {name} can meet, got ones below the unloaded "
        f"latency: the fastest, {scales[scale]}, needs {scale:.3g} times as much for "
        "requests that are served alone"
        if scale > 1
        else f"slo: expected targets that {name} can meet under load; the fastest, "
        f"{scales[scale]}, meets them only for requests that are served alone"
    )


def reasons_of(skipped: Mapping[str, str]) -> list[str]:
    """Return why layouts are left out, a line for each reason."""
    layouts: dict[str, list[str]] = {}
    for layout, why in skipped.items():
        reason = why.rpartition(", got")[0].removeprefix(f"{layout}: ")
        layouts.setdefault(reason, []).append(layout)
    return [f"{' '.join(names)}: {reason}" for reason, names in layouts.items()]
