"""Which deployment serves the most requests on given devices.

DistServe's two placement algorithms (OSDI'24, section 4), and a joint search in which
colocated systems take part, so that the answer can be not to disaggregate:

* high affinity (Algorithm 1; KV moves fast between any two devices): the best layout
  of each phase alone, then as many of each as balance;
* low affinity (Algorithm 2; KV moves inside a node): pairs of a prefill and a decode
  instance with equally many stages across nodes, simulated together, then replicated;
* joint: any numbers of both, simulated together, and colocated instances.

All of them are one search, `best_first`: a candidate is first simulated at the rate by
which it would beat the best so far, and searched further only if it passes there. What
cannot win even by the bound of its phases is not simulated at all. A phase alone has
less to wait for than in a pair, but its arrivals are not the same (prefill smooths or
bunches them), and pooled instances do better than one alone: their bound is an estimate
of what each does when it is always busy. So bounds are widened by a margin, and pruning
is as safe as the margin; tests/search/test_placement.py holds it against exhaustive
search.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from disagg_jax.deployment import Deployment, InstanceSpec, Role
from disagg_jax.errors import require
from disagg_jax.metrics import SLO
from disagg_jax.search.goodput import GoodputSearch, SimGoodput, find_goodput
from disagg_jax.search.phases import Build, decode_alone, prefill_alone
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import Mapper
from disagg_jax.workload import Workload

Progress = Callable[[str], None]
# Candidates between two looks at the best; fixed, so that the number of workers does
# not matter. The first have nothing to beat, so they are searched in full.
_FIRST, _AT_ONCE = 2, 4


@dataclasses.dataclass(frozen=True, order=True)
class Layout:
    """The parallelism of an instance."""

    tp: int
    pp: int = 1

    @property
    def devices(self) -> int:
        """Devices of one instance."""
        return self.tp * self.pp

    def spec(self, role: Role) -> InstanceSpec:
        """An instance of it."""
        return InstanceSpec(role=role, tp=self.tp, pp=self.pp)

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to be ranked by its goodput per device."""

    name: str
    search: GoodputSearch
    devices: float  # that its goodput is divided by
    bound_rps: float = math.inf  # its goodput is not above it
    copies: int = 1  # that fit on all devices
    layout: Layout | None = None  # of a phase alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a candidate."""

    candidate: Candidate
    goodput: SimGoodput | None  # None: not simulated, since its bound does not win

    @property
    def per_device_rps(self) -> float:
        """Goodput per device; 0 if it did not beat the best when it was tried."""
        if self.goodput is None or self.goodput.found.pass_rps is None:
            return 0.0
        return self.goodput.rps / self.candidate.devices

    @property
    def won(self) -> bool:
        """Whether its goodput was found; if not, it is at most `at_most_rps`."""
        return self.per_device_rps > 0

    @property
    def at_most_rps(self) -> float:
        """An upper bound of the goodput, as far as is known."""
        if self.goodput is None:
            return self.candidate.bound_rps
        found = self.goodput.found
        if found.pass_rps is not None and found.fail_rps is None:
            return math.inf  # it passed at all rates that were tried
        return max(found.interval.mean, found.fail_rps or 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Devices, requests and targets, and how deployments are simulated.

    Attributes:
      build: of disaggregated deployments; raises a ValueError where a model does not
        fit.
      colocated: the same of each colocated system.
      layouts: to choose from, for each instance.
      rate_rps: to be served by as many replicas as it takes: goodput counts per device
        used. Without it all `devices` count, also those that are left over.
      num_requests: of a run for up to `node_devices` devices; twice as many for up to
        twice the devices, and so on, since short runs end before a backlog hurts.
        Smaller deployments so run longer, and their goodputs are the more cautious.
      margin: by which bounds are widened.
    """

    build: Build
    colocated: Mapping[str, Build]
    layouts: tuple[Layout, ...]
    devices: int
    rate_rps: float | None = None
    node_devices: int = 8
    workload: Workload
    slo: SLO
    plan: SearchPlan = SearchPlan(growth=1.25, tolerance=0.05, max_rates=30)
    num_requests: int = 1000
    seeds: tuple[int, ...] = (0,)
    margin: float = 0.1

    def __post_init__(self) -> None:
        require(self.devices >= 1, "devices: expected >= 1", self.devices)
        require(self.margin >= 0, "margin: expected >= 0", self.margin)
        rate = self.rate_rps
        finite = rate is None or 0 < rate < math.inf
        require(finite, "rate_rps: expected > 0, and finite", rate)

    def copies(self, devices: int, nodes: int | None = None) -> int:
        """How often `devices` of them fit, each time inside `nodes` nodes if given."""
        if nodes is None or self.devices < self.node_devices:
            return self.devices // devices
        room = nodes * self.node_devices
        return self.devices // room * (room // devices)

    def share(self, devices: int, copies: int) -> float:
        """The devices that the goodput of one of the copies is divided by."""
        return devices if self.rate_rps is not None else self.devices / copies

    def ask(self, simulated: SimulatedDeployment, devices: int) -> GoodputSearch:
        """The search for a deployment's goodput."""
        return GoodputSearch(
            simulated=simulated,
            workload=self.workload,
            slo=self.slo,
            plan=self.plan,
            num_requests=self.num_requests * math.ceil(devices / self.node_devices),
            seeds=self.seeds,
        )

    def feasible(self) -> tuple[tuple[Layout, ...], dict[Layout, str]]:
        """The layouts that fit on the devices, and why the others do not."""
        skipped: dict[Layout, str] = {}
        for layout in self.layouts:
            try:
                expected = f"{layout}: expected at most {self.devices} devices"
                require(layout.devices <= self.devices, expected, layout.devices)
                self.build(pair(layout, layout))
            except ValueError as error:
                skipped[layout] = str(error)
        kept = tuple(layout for layout in self.layouts if layout not in skipped)
        return kept, skipped


def pair(
    prefill: Layout, decode: Layout, num_prefill: int = 1, num_decode: int = 1
) -> Deployment:
    """A deployment of prefill and decode instances."""
    return Deployment(
        (prefill.spec(Role.PREFILL),) * num_prefill
        + (decode.spec(Role.DECODE),) * num_decode
    )


# ---- the search ----------------------------------------------------------------------


def best_first(
    candidates: Sequence[Candidate],
    mapper: Mapper,
    progress: Progress,
    *,
    prune: bool = True,
    first: int = _FIRST,
    at_once: int = _AT_ONCE,
) -> list[Outcome]:
    """Finds the candidate with the highest goodput per device.

    Args:
      prune: without it all candidates are searched in full.
      first: candidates of the first batch.
      at_once: of each later one. With a mapper that does one at a time, 1 prunes most.

    Returns:
      An outcome for each candidate, the best first. If none has a goodput, none is
      `won`.
    """
    order = sorted(candidates, key=_promise, reverse=True)
    best, outcomes = 0.0, list[Outcome]()
    while len(outcomes) < len(order):
        begin, size = len(outcomes), at_once if outcomes else first
        batch = order[begin : begin + size]
        live = [c for c in batch if not prune or c.bound_rps > best * c.devices]
        asked = [_to_beat(c, best if prune else 0.0) for c in live]
        found = dict(zip(map(id, live), mapper(find_goodput, asked), strict=True))
        done = [Outcome(candidate=c, goodput=found.get(id(c))) for c in batch]
        outcomes += done
        best = max(best, *(outcome.per_device_rps for outcome in done))
        if live or len(outcomes) == len(order):
            done_of = f"{len(outcomes)}/{len(order)}"
            progress(f"{done_of}: best {best:.3g} requests/s per device")
    return sorted(outcomes, key=lambda o: (-o.per_device_rps, o.candidate.devices))


def _promise(candidate: Candidate) -> float:
    """What to try first: an early good one saves the search of many."""
    rate = min(candidate.search.first_rps(), candidate.bound_rps)
    return rate / candidate.devices


def _to_beat(candidate: Candidate, best: float) -> GoodputSearch:
    if best == 0:
        return candidate.search
    return dataclasses.replace(candidate.search, must_beat_rps=best * candidate.devices)


# ---- phases, and Algorithm 1 ---------------------------------------------------------


def phase_candidates(
    problem: Problem, layouts: Sequence[Layout], role: Role
) -> list[Candidate]:
    """One phase alone, on an instance of each layout."""
    alone = prefill_alone if role is Role.PREFILL else decode_alone
    return [
        Candidate(
            name=str(layout.spec(role)),
            search=alone(
                problem.build,
                layout.tp,
                layout.pp,
                1,
                problem.ask(problem.build(pair(layout, layout)), layout.devices),
            ),
            devices=layout.devices,
            layout=layout,
        )
        for layout in layouts
    ]


def replicas(
    prefill: Outcome,
    decode: Outcome,
    *,
    devices: int | None = None,
    rate_rps: float | None = None,
) -> tuple[int, int]:
    """How many prefill and decode instances: the last step of Algorithm 1.

    Args:
      devices: without a rate: the numbers with the highest min(n goodput_p, m
        goodput_d) that fit, of these those with the fewest devices; (0, 0) if not even
        one of each fits.
      rate_rps: the fewest that serve this rate.
    """
    rates, sizes = _rates_and_devices(prefill, decode)
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


def _rates_and_devices(
    prefill: Outcome, decode: Outcome
) -> tuple[tuple[float, float], tuple[float, float]]:
    both = (prefill, decode)
    rates = [o.per_device_rps * o.candidate.devices for o in both]
    require(min(rates) > 0, "replicas: expected a goodput > 0 of both phases", rates)
    return (rates[0], rates[1]), (prefill.candidate.devices, decode.candidate.devices)


# ---- Algorithm 2, and the joint search -----------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRates:
    """What the search of a phase says about one instance, in requests/s."""

    bound_rps: float  # its goodput is not above it
    about_rps: float  # its goodput, or an estimate of it
    pooled_rps: float  # a bound of what it adds to a pool: queues are shared there


Phases = tuple[Mapping[Layout, PhaseRates], Mapping[Layout, PhaseRates]]


def phase_rates(outcomes: Sequence[Outcome]) -> dict[Layout, PhaseRates]:
    """By layout."""
    return {
        outcome.candidate.layout: PhaseRates(
            bound_rps=outcome.at_most_rps,
            pooled_rps=_pooled_rps(outcome),
            about_rps=outcome.goodput.rps
            if outcome.goodput is not None and outcome.won
            else min(outcome.at_most_rps, outcome.candidate.search.first_rps()),
        )
        for outcome in outcomes
        if outcome.candidate.layout is not None
    }


def _pooled_rps(outcome: Outcome) -> float:
    """What a share `target` of which keeps an instance busy all the time."""
    search = outcome.candidate.search
    return max(outcome.at_most_rps, search.capacity_rps() / search.plan.target)


def low_affinity_candidates(
    problem: Problem, layouts: Sequence[Layout], phases: Phases
) -> list[Candidate]:
    """Pairs that share their nodes: Algorithm 2.

    Both instances have their stages spread over the same number of nodes, and equal
    stages lie together, so that in each node there are at most `node_devices`.
    """
    found: dict[str, Candidate] = {}
    for nodes in range(1, max(1, problem.devices // problem.node_devices) + 1):
        room = min(problem.devices, problem.node_devices)
        for p, d in itertools.product(layouts, repeat=2):
            spread = p.pp % nodes == 0 and d.pp % nodes == 0
            if spread and p.devices + d.devices <= nodes * room:
                candidate = _unit(problem, phases, (p, 1), (d, 1), nodes)
                found.setdefault(candidate.name, candidate)
    return list(found.values())


def joint_candidates(
    problem: Problem, layouts: Sequence[Layout], phases: Phases
) -> list[Candidate]:
    """Any numbers of two kinds of instances.

    Units that are multiples of another are left out: the same instances, pooled.
    """
    return [
        _unit(problem, phases, (p, n), (d, m))
        for p, d in itertools.product(layouts, repeat=2)
        for n, m in _counts(problem.devices, p.devices, d.devices)
    ]


def colocated_candidates(
    problem: Problem, layouts: Sequence[Layout]
) -> list[Candidate]:
    """One instance of each colocated system and layout, replicated."""
    return [
        Candidate(
            name=f"{system} {unit}",
            search=problem.ask(build(unit), unit.devices),
            devices=problem.share(unit.devices, copies),
            copies=copies,
        )
        for system, build in problem.colocated.items()
        for layout in layouts
        for unit in [Deployment((layout.spec(Role.COLOCATED),))]
        for copies in [problem.copies(unit.devices)]
    ]


def _counts(devices: int, prefill: int, decode: int) -> Iterator[tuple[int, int]]:
    for n in range(1, devices // prefill + 1):
        for m in range(1, (devices - n * prefill) // decode + 1):
            if math.gcd(n, m) == 1:
                yield n, m


def _unit(
    problem: Problem,
    phases: Phases,
    prefill: tuple[Layout, int],
    decode: tuple[Layout, int],
    nodes: int | None = None,
) -> Candidate:
    (p, n), (d, m) = prefill, decode
    unit = pair(p, d, n, m)
    rates = phases[0][p], phases[1][d]
    about = min(n * rates[0].about_rps, m * rates[1].about_rps)
    bound = min(_bound_rps(rates[0], n), _bound_rps(rates[1], m))
    asked = problem.ask(problem.build(unit), unit.devices)
    copies = problem.copies(unit.devices, nodes)
    return Candidate(
        name=str(unit),
        search=dataclasses.replace(asked, start_rps=about or None),
        devices=problem.share(unit.devices, copies),
        copies=copies,
        bound_rps=bound * (1 + problem.margin),
    )


def _bound_rps(rates: PhaseRates, count: int) -> float:
    return rates.bound_rps if count == 1 else count * rates.pooled_rps
