"""Which system serves the most within the targets of a workload.

A cell is a workload with targets. In it every system gets equal devices, one cost model
and identical arrivals, parameters chosen by its paper's rule
(`disagg_jax/scheduling/tuning.py`), and the best of all ways to use the devices:
tensor parallelism for colocated instances, and for disaggregation also the numbers of
prefill and decode instances. Cells share no runs: step sizes depend on the TPOT target,
a run must be long for its own targets, and a search that stops runs early and drops
hopeless candidates (`best_first`) needs fewer runs than full runs that several targets
could share.

A short run flatters: requests that arrive within one TTFT target, before the queue is
long, are good at any rate. So the runs of a cell last for many times its targets, at
the highest rate that any of its systems could serve. `ComparisonSpec.max_requests`
limits them, as that rate times the targets has no bound (one-token prompts and outputs,
or no target).

Seeds are added where they are needed by `cells`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, InstanceSpec, Parallelism, Role
from disagg_jax.errors import require
from disagg_jax.metrics import (
    SLO,
    Interval,
    Margin,
    look_confidence,
    margin,
    rate_interval,
)
from disagg_jax.scheduling import DISAGGREGATED, SYSTEMS, get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.tuning import TuningInputs, tune
from disagg_jax.search.candidates import (
    Candidate,
    CandidateResult,
    best_first,
    candidate_row,
)
from disagg_jax.search.capacity import capacity_rps
from disagg_jax.search.goodput import (
    DependentSeedsWarning,
    GoodputSearch,
)
from disagg_jax.search.maps import COLOCATED, INFEASIBLE, UNCLEAR, Cell
from disagg_jax.search.placement import LEFT_OUT, colocated_instances, pair
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.simulation import Simulation
from disagg_jax.workload.workload import Workload

# The papers of Orca and SARATHI hold few requests, as their memory is not paged. Here
# too they reserve memory for the longest case, but with Sarathi-Serve's rows.
KNOWN: Mapping[str, Mapping[Role, Policy]] = {
    **SYSTEMS,
    "orca": get_system("orca", colocated={"max_seqs": 128}),
    "sarathi": get_system("sarathi", colocated={"max_seqs": 128}),
}
# Those that are compared by default: TensorRT-LLM's, where memory is not short, would
# be a second Sarathi-Serve.
POLICIES = {name: system for name, system in KNOWN.items() if name not in LEFT_OUT}
_SAMPLE = 200  # requests that lengths and capacities are estimated from
# A run lasts at least for 10 TTFT targets, and 3 lives of a request at both targets.
_TTFTS, _LIVES = 10, 3
# A goodput may exceed the estimated capacity by this factor (the most seen was 1.2).
# Candidates that could only win by more are not simulated.
CAPACITY_MARGIN = 1.5
_MOST_LOOKS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSpec:
    """The conditions of a comparison, the same in all cells.

    Attributes:
      placed: deployments of systems that are to have no other, by name.

    Raises:
      ValueError: on unequal cost models, fewer than two systems, or a deployment that
        does not fit its system or the number of devices.
    """

    simulation: Simulation
    devices: int
    systems: Mapping[str, Mapping[Role, Policy]] = dataclasses.field(
        default_factory=lambda: POLICIES
    )
    placed: Mapping[str, Deployment] = dataclasses.field(
        default_factory=dict[str, Deployment]
    )
    sizes: tuple[int, ...]  # steps to choose from, in tokens
    budgets: tuple[int, ...] = ()  # if given, all are tried and the best is taken
    plan: SearchPlan = SearchPlan(growth=1.2, tolerance=0.08, max_rates=30)
    num_requests: int = 200  # of a run at least
    max_requests: int = 2500  # of a run at most; cells that need more are marked
    # Seeds after which a pair may be told apart. All systems get the first number.
    looks: tuple[int, ...] = (4, 8, 16)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds that all systems get."""
        return tuple(range(self.looks[0]))

    def __post_init__(self) -> None:
        require(self.devices >= 1, "devices: expected >= 1", self.devices)
        require(
            self.num_requests >= 1, "num_requests: expected >= 1", self.num_requests
        )
        expected = f"max_requests: expected >= num_requests ({self.num_requests})"
        require(self.max_requests >= self.num_requests, expected, self.max_requests)
        rises = all(a < b for a, b in itertools.pairwise((0, *self.looks)))
        steps = rises and 1 <= len(self.looks) <= _MOST_LOOKS
        expected = f"seeds: expected 1 to {_MOST_LOOKS} numbers that rise from above 0"
        require(steps, expected, list(self.looks))
        several = "systems: expected two or more"
        require(len(self.systems) > 1, several, list(self.systems))
        for name in self.systems:
            self._check_system(name)
        sizes = min((1, *self.sizes, *self.budgets))
        require(sizes >= 1, "budgets: expected >= 1", list(self.budgets))
        mark = self.simulation.mark
        require(not mark, "config: expected one cost model for all systems", mark)
        self.tensor_parallel()

    def _check_system(self, name: str) -> None:
        roles = set(self.systems[name])
        expected = "expected policies for colocated, or for prefill and decode"
        fitting = Role.COLOCATED in roles or roles == {Role.PREFILL, Role.DECODE}
        require(fitting, f"systems.{name}: {expected}", sorted(map(str, roles)))
        if name in self.placed:
            given, key = self.placed[name], f"systems.{name}.deployment"
            theirs = {spec.role for spec in given.instances}
            expected = f"{key}: expected instances of {', '.join(sorted(roles))} only"
            require(theirs <= roles, expected, str(given))
            equal = f"{key}: expected {self.devices} devices, as all systems have"
            require(given.devices == self.devices, equal, str(given))

    @property
    def two_kinds(self) -> bool:
        """Return whether there are both colocated and disaggregated systems."""
        kinds = {Role.COLOCATED in policies for policies in self.systems.values()}
        return len(kinds) == 2

    def deployments(self, system: str) -> list[Deployment]:
        """Return the deployments that a system is tried on."""
        if system in self.placed:
            return [self.placed[system]]
        roles = self.systems[system]
        return deployments(roles, self.devices, self.tensor_parallel())

    def tensor_parallel(self) -> tuple[int, ...]:
        """Return the tp at which the model fits on an instance.

        Raises:
          ValueError: with the reasons, if there is none.
        """
        fitting, reasons = list[int](), list[str]()
        for tp in range(1, self.devices + 1):
            try:
                layout = Parallelism(tp)
                instance = InstanceSpec(role=Role.COLOCATED, parallelism=layout)
                self.simulation.cost_of(instance).instance(layout)
                self.simulation.memory_of(instance)
                fitting.append(tp)
            except ValueError as error:
                reasons.append(str(error))
        least = min(fitting, default=self.devices)
        apart = any(Role.COLOCATED not in roles for roles in self.systems.values())
        count, instances = (2, "two instances") if apart else (1, "an instance")
        expected = (
            f"devices: expected enough for {instances} of "
            f"{self.simulation.model.name} ({'; '.join(reasons) or 'it fits'})"
        )
        enough = bool(fitting) and count * least <= self.devices
        require(enough, expected, self.devices)
        return tuple(fitting)


# ---- candidates ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A system on a deployment with parameters."""

    candidate: Candidate
    parameters: tuple[str, ...]  # tuned, with reasons; one for each role that is tuned
    size: int | None  # its step size in tokens, if it was given


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemSearch:
    """The options of one system in one cell."""

    system: str
    options: tuple[Option, ...]
    looks: tuple[int, ...]  # of the spec; of a short trace only what it has rows for
    needed_requests: float = 0.0  # by a run that lasts long enough; inf without targets

    def option(self, name: str) -> Option:
        """Return the option of that name."""
        return next(o for o in self.options if o.candidate.name == name)


def deployments(
    roles: Collection[Role], devices: int, tensor_parallel: Sequence[int]
) -> list[Deployment]:
    """Return all ways to use all devices with equal instances of each role."""
    if Role.COLOCATED in roles:
        return [
            colocated_instances(Parallelism(tp), devices // tp)
            for tp in tensor_parallel
            if devices % tp == 0
        ]
    return [
        pair(Parallelism(p), Parallelism(d), n, (devices - n * p) // d)
        for p, d in itertools.product(tensor_parallel, repeat=2)
        for n in range(1, (devices - d) // p + 1)
        if (devices - n * p) % d == 0
    ]


def system_searches(spec: ComparisonSpec, cell: Cell) -> list[SystemSearch]:
    """Return the searches of a cell, all with the same number of requests."""
    sample = cell.workload.requests(_SAMPLE, 1.0, spec.seeds[0])
    drafts = {system: list(_drafts(spec, cell, system)) for system in spec.systems}
    capacities = {
        id(draft): capacity_rps(draft.search.simulated, sample, cell.slo)
        for options in drafts.values()
        for draft, *_ in options
    }
    output = statistics.fmean(request.max_tokens for request in sample)
    finite = [rate for rate in capacities.values() if rate < math.inf]
    needed = max(finite) * run_s(cell.slo, output) if finite else 0.0
    least, most = spec.num_requests, spec.max_requests
    num_requests = max(least, math.ceil(min(needed, most)))
    looks = fitting_looks(spec.looks, cell.workload, num_requests)
    return [
        SystemSearch(
            system=system,
            looks=looks,
            needed_requests=max(needed, least),
            options=tuple(
                Option(
                    candidate=_sized(draft, num_requests, capacities[id(draft)], looks),
                    parameters=parameters,
                    size=size,
                )
                for draft, parameters, size in options
            ),
        )
        for system, options in drafts.items()
    ]


def fitting_looks(
    looks: Sequence[int], workload: Workload, num_requests: int
) -> tuple[int, ...]:
    """Return the looks with as many seeds as a trace has rows of its own for.

    A trace that has rows for one seed only leaves the first look, without an interval.
    """
    several = range(2, looks[-1] + 1)
    fitting = [n for n in several if not workload.why_dependent(num_requests, range(n))]
    if not fitting:
        return tuple(looks[:1])
    return tuple(sorted({min(look, fitting[-1]) for look in looks}))


def run_s(slo: SLO, output_tokens: float) -> float:
    """Return the seconds that a run should last."""
    return max(_TTFTS * slo.ttft_s, _LIVES * (slo.ttft_s + output_tokens * slo.tpot_s))


def _sized(
    draft: Candidate, num_requests: int, capacity: float, looks: Sequence[int]
) -> Candidate:
    start_rps = 0.8 * capacity if capacity < math.inf else None
    search = dataclasses.replace(
        draft.search,
        num_requests=num_requests,
        start_rps=start_rps,
        seeds=tuple(range(looks[0])),
    )
    bound_rps = CAPACITY_MARGIN * capacity
    return dataclasses.replace(draft, search=search, bound_rps=bound_rps)


def _drafts(
    spec: ComparisonSpec, cell: Cell, system: str
) -> Iterator[tuple[Candidate, tuple[str, ...], int | None]]:
    """Yield candidates that lack a number of requests, their parameters and sizes."""
    for deployment in spec.deployments(system):
        for size in spec.budgets or (None,):
            simulated, parameters = simulate(spec, cell, system, deployment, size)
            name = f"{deployment}" if size is None else f"{deployment} {size} tokens"
            search = GoodputSearch(
                simulated=simulated,
                workload=cell.workload,
                slo=cell.slo,
                seeds=spec.seeds,
                plan=spec.plan,
            )
            draft = Candidate(name=name, search=search, devices=spec.devices)
            yield draft, parameters, size


def simulate(
    spec: ComparisonSpec,
    cell: Cell,
    system: str,
    deployment: Deployment,
    size: int | None = None,
) -> tuple[SimulatedDeployment, tuple[str, ...]]:
    """Return a system on a deployment, and its parameters with reasons.

    Args:
      size: of a step in tokens; by default each paper's rule chooses it.
    """
    given = spec.systems[system]
    policies, parameters = _tuned(spec, cell, given, deployment, size)
    simulation = dataclasses.replace(spec.simulation, policies=policies)
    return simulation.build(deployment), parameters


def _tuned(
    spec: ComparisonSpec,
    cell: Cell,
    given: Mapping[Role, Policy],
    deployment: Deployment,
    size: int | None,
) -> tuple[dict[Role, Policy], tuple[str, ...]]:
    policies, parameters = dict[Role, Policy](), list[str]()
    for role, policy in given.items():
        instance = deployment.instances[deployment.of(role)[0]]
        inputs = tuning_inputs(spec, cell.workload, instance)
        tuned = tune(policy, inputs, cell.slo.tpot_s, size)
        policies[role] = tuned.policy
        if tuned.note:
            parameters.append(tuned.note)
    return policies, tuple(parameters)


def tuning_inputs(
    spec: ComparisonSpec, workload: Workload, instance: InstanceSpec
) -> TuningInputs:
    """Return what step sizes of an instance are chosen by, for typical requests."""
    cost = spec.simulation.cost_of(instance).instance(instance.parallelism)
    sample = workload.requests(_SAMPLE, 1.0, spec.seeds[0])
    n = spec.simulation.replicas(instance)  # a policy's limits are those of one of them
    return TuningInputs(
        step_s=lambda load: sum(cost.stages_s(load.times(n))),
        sizes=spec.sizes,
        prompt_tokens=round(statistics.fmean(r.prompt_tokens for r in sample)),
        output_tokens=round(statistics.fmean(r.max_tokens for r in sample)),
        kv_tokens=spec.simulation.kv_tokens(instance) // n,
    )


# ---- the search ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemResult:
    """The best option of a system in a cell; goodputs are per device."""

    system: str
    colocated: bool  # whether its instances do both prefill and decode
    deployment: str  # with its step size if several are tried
    parameters: tuple[str, ...]
    per_seed_rps: tuple[float, ...]  # zeros if it never met the target
    needs: float  # factor on the targets for requests that are served alone
    num_requests: int
    candidates: tuple[dict[str, Any], ...]  # all, the best first
    needed_requests: float = 0.0  # by runs that last long enough
    why_dependent: str = ""  # why the seeds' runs give no interval
    looks: tuple[int, ...] = ()  # of its search; () is one

    @property
    def goodput(self) -> Interval:
        """Return the interval across seeds."""
        return rate_interval(
            self.per_seed_rps,
            independent=not self.why_dependent,
            confidence=self.confidence,
        )

    @property
    def confidence(self) -> float:
        """Return the confidence of its intervals, corrected for the looks."""
        return look_confidence(max(1, len(self.looks)))

    @property
    def rps(self) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.per_seed_rps)

    def __str__(self) -> str:
        """Return the system and its goodput."""
        return f"{self.system} {self.rps:.3g}/s per device"

    @property
    def bounded(self) -> bool:
        """Return whether the runs have too few requests to last long enough."""
        return self.needed_requests > self.num_requests

    @property
    def inversion(self) -> str | None:
        """Describe where the attainment of the best option is not monotone."""
        return self.candidates[0].get("inversion") if self.candidates else None


def search_system(search: SystemSearch) -> SystemResult:
    """Search the best option of a system; a task for a worker."""
    candidates = [option.candidate for option in search.options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DependentSeedsWarning)  # the report says so
        results = best_first(candidates, map, first=1, at_once=1)
    parameters = {o.candidate.name: o.parameters for o in search.options}
    best = results[0]
    tried = [r.goodput for r in results if r.goodput is not None]
    return SystemResult(
        system=search.system,
        colocated=bool(best.candidate.search.simulated.deployment.of(Role.COLOCATED)),
        deployment=best.candidate.name,
        parameters=parameters[best.candidate.name],
        per_seed_rps=_per_seed(best),
        needs=min(goodput.unloaded_scale for goodput in tried),
        num_requests=best.candidate.search.num_requests,
        why_dependent=best.candidate.search.why_dependent,
        needed_requests=search.needed_requests,
        looks=search.looks,
        candidates=tuple(
            {**candidate_row(r), "parameters": parameters[r.candidate.name]}
            for r in results
        ),
    )


def _per_seed(result: CandidateResult) -> tuple[float, ...]:
    search, goodput = result.candidate.search, result.goodput
    if goodput is None or not result.won:
        return (0.0,) * len(search.seeds)
    return tuple(r / result.candidate.devices for r in goodput.found.per_seed_rps)


def cell_notes(results: Sequence[SystemResult]) -> list[str]:
    """Return the caveats of a cell: bounded runs, attainment that rises."""
    said = [f"{one.system}: {one.inversion}" for one in results if one.inversion]
    if results[0].bounded:
        said.insert(0, f"runs bounded to {needed(results[0])} requests")
    return said


def needed(found: SystemResult) -> str:
    """Return the requests of the runs; if bounded, also the number needed."""
    if not found.bounded:
        return f"{found.num_requests}"
    if found.needed_requests == math.inf:
        return f"{found.num_requests} of any number"
    return f"{found.num_requests} of {math.ceil(found.needed_requests)}"


# ---- who wins ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellVerdict:
    """The winner of a cell, and its margins."""

    ranked: tuple[SystemResult, ...]  # the highest goodput first
    over_runner_up: Margin
    # The best disaggregated and the best colocated one; of one kind, the two best.
    pair: tuple[SystemResult, SystemResult]
    over: Margin  # of the first of the pair over the second
    # DISAGGREGATED or COLOCATED, of one kind the winner's name; UNCLEAR or INFEASIBLE.
    verdict: str

    @property
    def winner(self) -> SystemResult:
        """Return the system with the highest goodput, by whatever margin."""
        return self.ranked[0]

    @property
    def two_kinds(self) -> bool:
        """Return whether the pair is a disaggregated and a colocated system."""
        ours, theirs = self.pair
        return ours.colocated != theirs.colocated

    @property
    def wants_seeds(self) -> bool:
        """Return whether it is undecided, and may have more seeds."""
        most = max(self.winner.looks, default=0)
        known = self.over.ratio is not None
        return self.verdict == UNCLEAR and known and self.seeds < most

    @property
    def seeds(self) -> int:
        """Return the seeds by which the pair is compared."""
        return min(len(one.per_seed_rps) for one in self.pair)

    @property
    def why_infeasible(self) -> str:
        """Say by how much the targets are missed if no system has a goodput."""
        nearest = min(self.ranked, key=lambda found: found.needs)
        if nearest.needs > 1:
            return (
                f"even alone {nearest.system} needs {nearest.needs:.3g} x the targets"
            )
        return "met by requests alone, but under no load that was tried"


def judge(results: Sequence[SystemResult]) -> CellVerdict:
    """Compare the systems of a cell: the two kinds, or the two best if all are of one.

    The best of several systems looks slightly too good, on either side: systems are
    compared on the runs that chose them.
    """
    ranked = tuple(sorted(results, key=lambda f: -f.rps))
    best = {one.colocated: one for one in reversed(ranked)}  # of each kind
    pair = (best[False], best[True]) if len(best) == 2 else (ranked[0], ranked[1])
    over = _margin(*pair)
    return CellVerdict(
        ranked=ranked,
        over_runner_up=_margin(ranked[0], ranked[1]),
        pair=pair,
        over=over,
        verdict=_verdict(*pair, over),
    )


def _verdict(ours: SystemResult, theirs: SystemResult, over: Margin) -> str:
    winner = ours if ours.rps > theirs.rps else theirs
    if winner.rps == 0:
        return INFEASIBLE
    if not over.clear:
        return UNCLEAR
    if ours.colocated == theirs.colocated:
        return winner.system
    return COLOCATED if winner.colocated else DISAGGREGATED


def _margin(ours: SystemResult, theirs: SystemResult) -> Margin:
    """Compare two systems by the seeds that both have."""
    common = min(len(ours.per_seed_rps), len(theirs.per_seed_rps))
    return margin(
        ours.per_seed_rps[:common],
        theirs.per_seed_rps[:common],
        independent=not (ours.why_dependent or theirs.why_dependent),
        confidence=ours.confidence,
    )
