"""Which system serves the most within its targets: questions, cells, and who wins.

A cell is a workload with targets. In it every system gets equal devices, one cost model
and identical arrivals, parameters chosen by its paper's rule
(`disagg_jax/scheduling/tuning.py`), and the best of all ways to use the devices:
tensor parallelism for colocated instances, and for disaggregation also how many
prefill and how many decode. Cells share no runs: step sizes depend on the TPOT target,
a run must be long for its own targets, and a search that stops runs early and drops
what cannot win (`best_first`) needs fewer than runs in full that could be judged by
several targets.

A short run flatters: what arrives within one TTFT target before the queue is long is
good at any rate. So a cell's runs last for many times its targets, at the highest rate
that any of its systems could serve; but for `Question.max_requests` at most, as that
rate times the targets has no end (prompts and outputs of a token, no target at all).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Deployment, InstanceSpec, Role
from disagg_jax.errors import require
from disagg_jax.metrics import SLO, Interval, interval_across, rate_interval
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.tuning import TuningInputs, tune
from disagg_jax.search.capacity import capacity_rps
from disagg_jax.search.goodput import DependentSeedsWarning, GoodputSearch
from disagg_jax.search.placement import Candidate, Layout, Outcome, best_first, pair
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.run import SimWorkload, Workload
from disagg_jax.sim.workers import Mapper
from disagg_jax.workload.lengths import FixedLengths, Lengths, LognormalLengths
from experiments.configs.named_simulations import Simulation
from experiments.placement.placements import row

DISAGGREGATED = "disaggregated"
# Chunked prefill is for KV that leaves while it is computed; here it leaves afterwards.
_LEFT_OUT = "disaggregated_chunked"
# Orca's and SARATHI's papers hold few requests, as their memory is not paged; they keep
# it for the longest case here, too, but not more rows than Sarathi-Serve has.
POLICIES: Mapping[str, Mapping[Role, Policy]] = {
    **{name: system for name, system in SYSTEMS.items() if name != _LEFT_OUT},
    "orca": {Role.COLOCATED: Orca(max_seqs=128)},
    "sarathi": {Role.COLOCATED: Sarathi(max_seqs=128)},
}
_SAMPLE = 200  # requests by which lengths and capacities are estimated
# A run lasts for so many TTFT targets, and lives of a request at both targets.
_TTFTS, _LIVES = 10, 3
# By which a goodput may exceed the estimated capacity; more is not expected of what is
# not simulated. 1.2 was the most seen.
_MARGIN = 1.5

# ---- the question --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is compared, the same in all cells.

    Raises:
      ValueError: on unequal cost models, or systems that give nothing to compare.
    """

    simulation: Simulation
    devices: int
    systems: tuple[str, ...] = tuple(POLICIES)
    sizes: tuple[int, ...]  # steps to choose from, in tokens
    budgets: tuple[int, ...] = ()  # with them, all are tried and the best is taken
    plan: SearchPlan = SearchPlan(growth=1.2, tolerance=0.08, max_rates=30)
    num_requests: int = 200  # of a run at least
    max_requests: int = 2500  # of a run at most; cells that need more say so
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        require(self.devices >= 2, "devices: expected >= 2", self.devices)
        require(
            self.num_requests >= 1, "num_requests: expected >= 1", self.num_requests
        )
        expected = f"max_requests: expected >= num_requests ({self.num_requests})"
        require(self.max_requests >= self.num_requests, expected, self.max_requests)
        require(len(self.seeds) >= 1, "seeds: expected >= 1", len(self.seeds))
        unknown = [name for name in self.systems if name not in POLICIES]
        require(not unknown, f"systems: expected of {sorted(POLICIES)}", unknown)
        both = DISAGGREGATED in self.systems and len(set(self.systems)) > 1
        expected = f"systems: expected {DISAGGREGATED} and a colocated one"
        require(both, expected, list(self.systems))
        sizes = min((1, *self.sizes, *self.budgets))
        require(sizes >= 1, "budgets: expected >= 1", list(self.budgets))
        mark = self.simulation.mark
        require(not mark, "config: expected one cost model for all systems", mark)
        self.tensor_parallel()

    def tensor_parallel(self) -> tuple[int, ...]:
        """The tp with which the model fits on an instance.

        Raises:
          ValueError: with the reasons, if there is none.
        """
        fitting, reasons = list[int](), list[str]()
        for tp in range(1, self.devices + 1):
            try:
                spec = InstanceSpec(role=Role.COLOCATED, tp=tp)
                self.simulation.cost_of(spec).instance(tp)
                self.simulation.memory_of(spec)
                fitting.append(tp)
            except ValueError as error:
                reasons.append(str(error))
        least = min(fitting, default=self.devices)
        expected = (
            f"devices: expected enough for two instances of {self.simulation.model} "
            f"({'; '.join(reasons) or 'it fits'})"
        )
        require(2 * least <= self.devices, expected, self.devices)
        return tuple(fitting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A workload and targets."""

    workload: Workload
    slo: SLO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """What changes along one side of a map.

    Raises:
      ValueError: unless the values rise and are above 0.
    """

    name: str
    unit: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = itertools.pairwise((0.0, *self.values))
        rises = len(self.values) > 0 and all(a < b for a, b in pairs)
        expected = f"{self.name}: expected one or more values that rise from above 0"
        require(rises, expected, list(self.values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """Cells over two axes."""

    name: str
    fixed: str  # what does not change
    x: Axis
    y: Axis
    cells: Mapping[tuple[int, int], Cell]  # by the indices of x and y


def lengths_map(
    prompts: Sequence[float],
    outputs: Sequence[float],
    sigma: float,
    slo: SLO,
    max_tokens: int,
) -> Map:
    """Mean prompt length x mean output length.

    Args:
      sigma: of the logarithm of both lengths; 0 gives all requests the mean.
      max_tokens: of a request; longer ones lose output.

    Raises:
      ValueError: on bad axes or lengths, or if a mean request is too long.
    """
    x = Axis(name="mean prompt", unit="tokens", values=tuple(prompts))
    y = Axis(name="mean output", unit="tokens", values=tuple(outputs))
    longest = x.values[-1] + y.values[-1]
    expected = f"prompts, outputs: expected {max_tokens} tokens together at most"
    require(longest <= max_tokens, expected, longest)
    lengths = functools.partial(_lengths, sigma=sigma, high=max_tokens)
    cells = {
        (i, j): Cell(
            workload=SimWorkload(
                prompt=lengths(prompt),
                output=lengths(output),
                max_total_tokens=max_tokens,
            ),
            slo=slo,
        )
        for i, prompt in enumerate(x.values)
        for j, output in enumerate(y.values)
    }
    spread = f"log-normal lengths, sigma {sigma:g}" if sigma else "fixed lengths"
    fixed = f"{spread}; {shown_slo(slo)}"
    return Map(name="lengths", fixed=fixed, x=x, y=y, cells=cells)


def _lengths(mean: float, sigma: float, high: int) -> Lengths:
    if sigma == 0:
        return FixedLengths(tokens=int(mean))
    return LognormalLengths.from_mean(mean=mean, sigma=sigma, high=high)


def slos_map(
    ttfts_s: Sequence[float], tpots_s: Sequence[float], workload: Workload, name: str
) -> Map:
    """TTFT target x TPOT target.

    Raises:
      ValueError: on bad axes.
    """
    x = Axis(name="TTFT target", unit="s", values=tuple(ttfts_s))
    y = Axis(name="TPOT target", unit="s", values=tuple(tpots_s))
    cells = {
        (i, j): Cell(workload=workload, slo=SLO(ttft_s=ttft_s, tpot_s=tpot_s))
        for i, ttft_s in enumerate(x.values)
        for j, tpot_s in enumerate(y.values)
    }
    return Map(name="targets", fixed=f"workload {name}", x=x, y=y, cells=cells)


def shown_slo(slo: SLO) -> str:
    """Targets as text."""
    return f"TTFT <= {slo.ttft_s:g} s, TPOT <= {slo.tpot_s:g} s"


# ---- candidates ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A system on a deployment with parameters."""

    candidate: Candidate
    parameters: tuple[str, ...]  # with their reasons, one for each role that has some


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """What is to be searched for one system in one cell."""

    system: str
    options: tuple[Option, ...]
    needed_requests: float = 0.0  # for runs that last long enough; inf for no target


def deployments(
    system: str, devices: int, tensor_parallel: Sequence[int]
) -> list[Deployment]:
    """All ways to use all devices with equal instances of each role."""
    if system != DISAGGREGATED:
        return [
            Deployment((InstanceSpec(role=Role.COLOCATED, tp=tp),) * (devices // tp))
            for tp in tensor_parallel
            if devices % tp == 0
        ]
    return [
        pair(Layout(p), Layout(d), n, (devices - n * p) // d)
        for p, d in itertools.product(tensor_parallel, repeat=2)
        for n in range(1, (devices - d) // p + 1)
        if (devices - n * p) % d == 0
    ]


def contests(question: Question, cell: Cell) -> list[Contest]:
    """What to search in a cell; all with equal numbers of requests."""
    sample = cell.workload.requests(_SAMPLE, 1.0, question.seeds[0])
    drafts = {
        system: list(_drafts(question, cell, system)) for system in question.systems
    }
    capacities = {
        id(draft): capacity_rps(draft.search.simulated, sample, cell.slo)
        for options in drafts.values()
        for draft, _ in options
    }
    output = statistics.fmean(request.max_tokens for request in sample)
    finite = [rate for rate in capacities.values() if rate < math.inf]
    needed = max(finite) * run_s(cell.slo, output) if finite else 0.0
    least, most = question.num_requests, question.max_requests
    num_requests = max(least, math.ceil(min(needed, most)))
    return [
        Contest(
            system=system,
            needed_requests=max(needed, least),
            options=tuple(
                Option(
                    candidate=_sized(draft, num_requests, capacities[id(draft)]),
                    parameters=parameters,
                )
                for draft, parameters in options
            ),
        )
        for system, options in drafts.items()
    ]


def run_s(slo: SLO, output_tokens: float) -> float:
    """Seconds for which a run should last."""
    return max(_TTFTS * slo.ttft_s, _LIVES * (slo.ttft_s + output_tokens * slo.tpot_s))


def _sized(draft: Candidate, num_requests: int, capacity: float) -> Candidate:
    start_rps = 0.8 * capacity if capacity < math.inf else None
    search = dataclasses.replace(
        draft.search, num_requests=num_requests, start_rps=start_rps
    )
    return dataclasses.replace(draft, search=search, bound_rps=_MARGIN * capacity)


def _drafts(
    question: Question, cell: Cell, system: str
) -> Iterator[tuple[Candidate, tuple[str, ...]]]:
    """Candidates whose number of requests is not known yet, and their parameters."""
    for deployment in deployments(system, question.devices, question.tensor_parallel()):
        for size in question.budgets or (None,):
            policies, parameters = _tuned(question, cell, system, deployment, size)
            simulation = dataclasses.replace(question.simulation, policies=policies)
            name = f"{deployment}" if size is None else f"{deployment} {size} tokens"
            search = GoodputSearch(
                simulated=simulation.build(deployment),
                workload=cell.workload,
                slo=cell.slo,
                seeds=question.seeds,
                plan=question.plan,
            )
            draft = Candidate(name=name, search=search, devices=question.devices)
            yield draft, parameters


def _tuned(
    question: Question,
    cell: Cell,
    system: str,
    deployment: Deployment,
    size: int | None,
) -> tuple[dict[Role, Policy], tuple[str, ...]]:
    policies, parameters = dict[Role, Policy](), list[str]()
    for role, policy in POLICIES[system].items():
        spec = deployment.instances[deployment.of(role)[0]]
        profile = _profile(question, cell, spec)
        tuned = tune(policy, profile, cell.slo.tpot_s, size)
        policies[role] = tuned.policy
        if tuned.choice is not None:
            parameters.append(str(tuned.choice))
    return policies, tuple(parameters)


def _profile(question: Question, cell: Cell, spec: InstanceSpec) -> TuningInputs:
    cost = question.simulation.cost_of(spec).instance(spec.tp, spec.pp)
    sample = cell.workload.requests(_SAMPLE, 1.0, question.seeds[0])
    return TuningInputs(
        step_s=lambda load: sum(cost.stages_s(load)),
        sizes=question.sizes,
        prompt_tokens=round(statistics.fmean(r.prompt_tokens for r in sample)),
        output_tokens=round(statistics.fmean(r.max_tokens for r in sample)),
        kv_tokens=question.simulation.kv_tokens(spec),
    )


# ---- the search ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What came of a system in a cell; goodputs are per device."""

    system: str
    deployment: str  # the best; with its step size where several are tried
    parameters: tuple[str, ...]
    per_seed_rps: tuple[float, ...]  # zeros if it never met the target
    needs: float  # times the targets, for requests that are served alone
    num_requests: int
    candidates: tuple[dict[str, Any], ...]  # all, the best first
    needed_requests: float = 0.0  # for runs that last long enough; see `Question`
    why_dependent: str = ""  # why the seeds' runs give no interval

    @property
    def goodput(self) -> Interval:
        """Across seeds."""
        return rate_interval(self.per_seed_rps, independent=not self.why_dependent)

    @property
    def rps(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.per_seed_rps)

    @property
    def bounded(self) -> bool:
        """Whether its runs have fewer requests than would last long enough."""
        return self.needed_requests > self.num_requests

    @property
    def inversion(self) -> str | None:
        """Where the attainment of the best is not monotone in the rate."""
        return self.candidates[0].get("inversion") if self.candidates else None


def find(contest: Contest) -> Found:
    """Searches the best option of a contest; a task for a worker."""
    candidates = [option.candidate for option in contest.options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DependentSeedsWarning)  # the report says so
        outcomes = best_first(candidates, map, lambda text: None, first=1, at_once=1)
    parameters = {o.candidate.name: o.parameters for o in contest.options}
    best = outcomes[0]
    tried = [o.goodput for o in outcomes if o.goodput is not None]
    return Found(
        system=contest.system,
        deployment=best.candidate.name,
        parameters=parameters[best.candidate.name],
        per_seed_rps=_per_seed(best),
        needs=min(goodput.unloaded_scale for goodput in tried),
        num_requests=best.candidate.search.num_requests,
        why_dependent=best.candidate.search.why_dependent,
        needed_requests=contest.needed_requests,
        candidates=tuple(
            {**row(o), "parameters": parameters[o.candidate.name]} for o in outcomes
        ),
    )


def _per_seed(outcome: Outcome) -> tuple[float, ...]:
    search, goodput = outcome.candidate.search, outcome.goodput
    if goodput is None or not outcome.won:
        return (0.0,) * len(search.seeds)
    return tuple(r / outcome.candidate.devices for r in goodput.found.per_seed_rps)


def compare(
    question: Question,
    maps: Sequence[Map],
    mapper: Mapper,
    progress: Callable[[str], None],
) -> list[dict[tuple[int, int], tuple[Found, ...]]]:
    """Every system in every cell of every map."""
    grids: list[dict[tuple[int, int], tuple[Found, ...]]] = [{} for _ in maps]
    cells = [
        (grid, each, at)
        for grid, each in zip(grids, maps, strict=True)
        for at in each.cells
    ]
    asked = [contests(question, each.cells[at]) for _, each, at in cells]
    progress(f"{len(cells)} cells x {len(question.systems)} systems")
    results = mapper(find, list(itertools.chain(*asked)))
    for done, (grid, each, at) in enumerate(cells, 1):
        grid[at] = tuple(itertools.islice(results, len(question.systems)))
        x, y = each.x.values[at[0]], each.y.values[at[1]]
        where = f"{each.x.name} {x:g}, {each.y.name} {y:g} {each.y.unit}"
        said = [judge(grid[at]).summary, *cell_notes(grid[at])]
        progress(f"{done}/{len(cells)}: {where}: {'; '.join(said)}")
    return grids


def cell_notes(found: Sequence[Found]) -> list[str]:
    """What to know about a cell's goodputs: bounded runs, attainment that rises."""
    said = [f"{one.system}: {one.inversion}" for one in found if one.inversion]
    if found[0].bounded:
        said.insert(0, f"runs bounded to {needed(found[0])} requests")
    return said


def needed(found: Found) -> str:
    """The requests of its runs, of those that it would take."""
    if not found.bounded:
        return f"{found.num_requests}"
    if found.needed_requests == math.inf:
        return f"{found.num_requests} of any number"
    return f"{found.num_requests} of {math.ceil(found.needed_requests)}"


# ---- who wins ------------------------------------------------------------------------

UNCLEAR, INFEASIBLE, COLOCATED = "no clear winner", "infeasible", "colocated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin:
    """One system's goodput over another's, paired by seed."""

    ratio: Interval | None  # geometric mean; None where one of them has no goodput
    clear: bool  # the interval excludes 1, or only one of them has a goodput at all


def margin(
    ours: Sequence[float], theirs: Sequence[float], *, independent: bool = True
) -> Margin:
    """The ratio by seed, with an interval that is its inverse if the two change places.

    A system without goodput gives no ratio; the other is clearly better if each of its
    seeds has one.

    Args:
      independent: whether seeds are independent samples; if not, there is no interval.
    """
    if min(*ours, *theirs) > 0:
        logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
        of_logs = interval_across(logs)
        mean, low, high = of_logs.mean, of_logs.low, of_logs.high
        if low is None or high is None or not independent:
            ratio = Interval(mean=math.exp(mean), low=None, high=None)
            return Margin(ratio=ratio, clear=False)
        ratio = Interval(mean=math.exp(mean), low=math.exp(low), high=math.exp(high))
        return Margin(ratio=ratio, clear=low > 0 or high < 0)
    alone = min(ours) > 0 == max(theirs) or min(theirs) > 0 == max(ours)
    return Margin(ratio=None, clear=alone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Who wins a cell, and by how much."""

    ranked: tuple[Found, ...]  # the highest goodput first
    over_runner_up: Margin
    best_colocated: Found
    disaggregated: Found
    over_colocated: Margin  # of disaggregated
    verdict: str  # DISAGGREGATED, COLOCATED, UNCLEAR or INFEASIBLE

    @property
    def winner(self) -> Found:
        """The system with the highest goodput, if by ever so little."""
        return self.ranked[0]

    @property
    def summary(self) -> str:
        """A few words."""
        if self.verdict == INFEASIBLE:
            return self.why_infeasible
        return f"{self.winner.system} {self.winner.rps:.3g}/s per device"

    @property
    def why_infeasible(self) -> str:
        """By how much the targets are missed where nobody has a goodput."""
        nearest = min(self.ranked, key=lambda found: found.needs)
        if nearest.needs > 1:
            return (
                f"even alone {nearest.system} needs {nearest.needs:.3g} x the targets"
            )
        return "met by requests alone, but under no load that was tried"


def judge(found: Sequence[Found]) -> Judged:
    """Compares the systems of a cell.

    The best of several is a little too good, on either side: they are compared on the
    runs by which they were chosen.
    """
    ranked = tuple(sorted(found, key=lambda f: -f.rps))
    (disaggregated,) = (f for f in found if f.system == DISAGGREGATED)
    colocated = next(f for f in ranked if f.system != DISAGGREGATED)
    over = _margin(disaggregated, colocated)
    verdict = UNCLEAR
    if ranked[0].rps == 0:
        verdict = INFEASIBLE
    elif over.clear:
        wins = disaggregated.rps > colocated.rps
        verdict = DISAGGREGATED if wins else COLOCATED
    return Judged(
        ranked=ranked,
        over_runner_up=_margin(ranked[0], ranked[1]),
        best_colocated=colocated,
        disaggregated=disaggregated,
        over_colocated=over,
        verdict=verdict,
    )


def _margin(ours: Found, theirs: Found) -> Margin:
    independent = not (ours.why_dependent or theirs.why_dependent)
    return margin(ours.per_seed_rps, theirs.per_seed_rps, independent=independent)


# ---- when ----------------------------------------------------------------------------

Rectangle = tuple[range, range]  # indices of x and of y


def rectangles(verdicts: Mapping[tuple[int, int], str], wanted: str) -> list[Rectangle]:
    """Rectangles that cover all cells with the verdict `wanted`, the largest first.

    Of other cells they have infeasible ones only.
    """
    xs, ys = (1 + max(at[axis] for at in verdicts) for axis in (0, 1))
    pure = [
        (x, y)
        for x, y in itertools.product(_ranges(xs), _ranges(ys))
        if {verdicts[at] for at in itertools.product(x, y)} <= {wanted, INFEASIBLE}
    ]
    left = {at for at, verdict in verdicts.items() if verdict == wanted}
    chosen: list[Rectangle] = []
    while left:
        best = max(pure, key=lambda r: len(left.intersection(itertools.product(*r))))
        chosen.append(best)
        left.difference_update(itertools.product(*best))
    return chosen


def _ranges(n: int) -> list[range]:
    return [range(i, j) for i in range(n) for j in range(i + 1, n + 1)]


def sentence(each: Map, verdicts: Mapping[tuple[int, int], str]) -> str:
    """When not to disaggregate, by the cells of a map."""
    counts = ", ".join(
        f"{name} {list(verdicts.values()).count(name)}"
        for name in (DISAGGREGATED, COLOCATED, UNCLEAR, INFEASIBLE)
    )
    cases = [_case(each, r) for r in rectangles(verdicts, COLOCATED)]
    tried = f"(of {len(verdicts)} cells, {each.fixed}: {counts})"
    if not cases:
        return f"No cell says not to disaggregate {tried}."
    return f"Do not disaggregate with {'; nor with '.join(cases)} {tried}."


def _case(each: Map, rectangle: Rectangle) -> str:
    sides = [
        side
        for axis, part in zip((each.x, each.y), rectangle, strict=True)
        if (side := _side(axis, part))
    ]
    return " and ".join(sides) or f"any {each.x.name} and {each.y.name} that was tried"


def _side(axis: Axis, part: range) -> str:
    """A part of an axis in words; '' for all of it."""
    low, high = axis.values[part[0]], axis.values[part[-1]]
    first, last = part[0] == 0, part[-1] == len(axis.values) - 1
    if first and last:
        return ""
    if low == high and not (first or last):
        bounds = f"= {low:g}"
    elif first:
        bounds = f"<= {high:g}"
    elif last:
        bounds = f">= {low:g}"
    else:
        bounds = f"from {low:g} to {high:g}"
    return f"{axis.name} {bounds} {axis.unit}"
