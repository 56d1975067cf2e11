"""Placement: counting, and pruned searches against exhaustive ones."""

import dataclasses
import math

import pytest

from disagg_jax.deployment import Deployment, KVMemory, Parallelism, Role
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.goodput import GoodputEstimate
from disagg_jax.metrics.intervals import Interval
from disagg_jax.progress import silent
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.search.candidates import Candidate, CandidateResult, best_first
from disagg_jax.search.goodput import SimGoodput
from disagg_jax.search.placement import (
    PhaseRates,
    PlacementProblem,
    colocated_candidates,
    joint_candidates,
    low_affinity_candidates,
    pair,
    phase_candidates,
    phase_rates,
    replicas,
)
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.cost.deployment import ModelledCost
from disagg_jax.sim.hardware.network import Network
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.workload.lengths import UniformLengths
from disagg_jax.workload.workload import RandomWorkload

POLICIES = {**SYSTEMS["vllm_v0"], **SYSTEMS["disaggregated"]}
SMALL = (Parallelism(1, 1), Parallelism(2, 1), Parallelism(1, 2))


@dataclasses.dataclass(frozen=True)
class Speed:
    """An `InstanceCost`: prompts gain from tp, decodes hardly."""

    tp: int
    pp: int

    def stages_s(self, load):
        prompt_s = 3e-4 * load.prompt_tokens / self.tp**0.8
        return ((self._base_s(load.decodes) + prompt_s) / self.pp,) * self.pp

    def decode_s(self, decodes, context):
        return self._base_s(decodes)

    def _base_s(self, decodes):
        return 0.008 / self.tp**0.3 + 4e-4 * decodes


def build(deployment):
    instances = deployment.instances
    if any(spec.parallelism.tp > 4 for spec in instances):
        raise ValueError("expected tp <= 4, got more")
    return SimulatedDeployment(
        deployment=deployment,
        policies=POLICIES,
        memory=(KVMemory(num_blocks=2000, max_context=2048),) * len(instances),
        cost=ModelledCost(
            instances=tuple(
                Speed(spec.parallelism.tp, spec.parallelism.pp) for spec in instances
            ),
            network=Network(deployment=deployment, kv_bytes_per_token=1),
        ),
    )


def problem(**changes):
    given = PlacementProblem(
        apart={"disaggregated": build},
        colocated={"vllm_v0": build},
        layouts=SMALL,
        devices=3,
        workload=RandomWorkload(
            prompt=UniformLengths(low=50, high=400),
            output=UniformLengths(low=20, high=80),
        ),
        slo=SLO(ttft_s=0.3, tpot_s=0.025),
        plan=SearchPlan(growth=1.3, tolerance=0.05, max_rates=30),
        num_requests=120,
    )
    return dataclasses.replace(given, **changes)


def phases(given, prune=False):
    rates = [
        phase_rates(
            best_first(
                phase_candidates(given, "disaggregated", given.layouts, role),
                map,
                silent,
                prune=prune,
            )
        )
        for role in (Role.PREFILL, Role.DECODE)
    ]
    return rates[0], rates[1]


# ---- pruning -------------------------------------------------------------------------

SPACES = [
    problem(),
    problem(slo=SLO(ttft_s=0.15, tpot_s=0.05)),  # prompts are what is hard
    problem(slo=SLO(ttft_s=1.0, tpot_s=0.013)),  # decoding is
]


@pytest.mark.parametrize(
    "given", [*SPACES[:2], pytest.param(SPACES[2], marks=pytest.mark.slow)]
)
def test_pruning_keeps_the_winner(given):
    bounds = phases(given)
    units = [
        *joint_candidates(given, "disaggregated", given.layouts, bounds),
        *colocated_candidates(given, given.layouts),
    ]
    full = best_first(units, map, silent, prune=False)
    fast = best_first(units, map, silent)
    assert all(outcome.goodput is not None for outcome in full)
    # The first two are searched in full by both: in ten or so, that is much.
    assert runs(fast) < 0.7 * runs(full)
    one_by_one = best_first(units, map, silent, first=1, at_once=1)
    assert runs(one_by_one) < 0.7 * runs(full)
    values = {outcome.candidate.name: outcome.per_device_rps for outcome in full}
    assert values[one_by_one[0].candidate.name] >= full[0].per_device_rps / 1.05
    # Goodputs are known to the plan's 5 %.
    assert values[fast[0].candidate.name] >= full[0].per_device_rps / 1.05
    for outcome in full:  # what pruning relies on
        assert outcome.per_device_rps <= (
            outcome.candidate.bound_rps / outcome.candidate.devices
        )


@pytest.mark.parametrize(
    "given", [SPACES[0], pytest.param(SPACES[1], marks=pytest.mark.slow)]
)
def test_pruned_phases_give_bounds_too(given):
    full, fast = phases(given), phases(given, prune=True)
    for role in (0, 1):
        best = max(full[role][k].about_rps / k.devices for k in given.layouts)
        for layout in given.layouts:
            assert fast[role][layout].bound_rps >= full[role][layout].about_rps / 1.05
        found = max(fast[role][k].about_rps / k.devices for k in given.layouts)
        assert found == pytest.approx(best, rel=0.05)


def runs(outcomes):
    return sum(outcome.goodput.runs for outcome in outcomes if outcome.goodput)


# ---- the search, by hand -------------------------------------------------------------


def goodput_of(rps, pass_rps=None, fail_rps=None):
    found = GoodputEstimate(
        per_seed_rps=(rps,),
        interval=Interval(mean=rps, low=None, high=None),
        pass_rps=pass_rps,
        fail_rps=fail_rps,
        bracketed=True,
        resolved=False,
    )
    return SimGoodput(
        found=found,
        steady=True,
        num_requests=1,
        seeds=(0,),
        runs=1,
        unloaded_scale=0.0,
    )


class Known:
    """Candidates of known goodputs, and a mapper that notes what it is asked for."""

    def __init__(self):
        self.asked, self._rps = [], {}
        given = problem()
        self._search = given.ask(build(pair(Parallelism(1), Parallelism(1))), 1)

    def candidate(self, name, rps, devices, bound_rps=math.inf):
        """One whose search begins at its goodput."""
        self._rps[rps] = name
        search = dataclasses.replace(self._search, start_rps=rps)
        return Candidate(name=name, search=search, devices=devices, bound_rps=bound_rps)

    def __call__(self, function, searches):
        for search in searches:
            self.asked.append((self._rps[search.start_rps], search.must_beat_rps))
            lost = search.start_rps <= (search.must_beat_rps or 0.0)
            yield goodput_of(
                0.0 if lost else search.start_rps,
                None if lost else search.start_rps,
                search.must_beat_rps if lost else 1.05 * search.start_rps,
            )


def test_the_most_promising_is_first_and_others_are_to_beat_it_per_device():
    known = Known()
    candidates = [
        known.candidate("a", 8.0, 4),  # 2 a device
        known.candidate("b", 6.0, 2),  # 3
        known.candidate("c", 10.0, 2, bound_rps=5.0),  # no more than 2.5
        known.candidate("d", 3.0, 1, bound_rps=3.5),  # no more than f has
        known.candidate("e", 9.0, 3, bound_rps=20.0),  # 3 too
        known.candidate("f", 7.0, 2, bound_rps=6.1),  # 3.05, as far as is known
    ]
    found = best_first(candidates, known, silent, first=1, at_once=1)
    # f promises the most, 3.05 a device, and has 3.5: on 2, 3 and 4 devices that is 7,
    # 10.5 and 14 to beat. c and d cannot by their bounds.
    assert known.asked == [("f", None), ("b", 7.0), ("e", 10.5), ("a", 14.0)]
    assert (found[0].candidate.name, found[0].per_device_rps) == ("f", 3.5)
    bounded = {o.candidate.name for o in found if o.goodput is None}
    assert bounded == {"c", "d"}


def test_without_pruning_all_are_searched_in_full():
    known = Known()
    candidates = [
        known.candidate("a", 8.0, 4),
        known.candidate("b", 4.0, 2),
        known.candidate("c", 1.0, 1, bound_rps=1.0),
    ]
    found = best_first(candidates, known, silent, prune=False, first=1, at_once=1)
    assert sorted(known.asked) == [("a", None), ("b", None), ("c", None)]
    # Of equal goodputs per device, that on fewer devices.
    assert [o.candidate.name for o in found] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("goodput", "won", "at_most_rps"),
    [
        (None, False, 7.0),  # its bound
        (goodput_of(4.0, 4.0, 4.2), True, 4.2),  # where it failed
        (goodput_of(4.5, 4.0, 4.2), True, 4.5),  # or the mean of its seeds' own
        (goodput_of(4.0, 4.0, None), True, math.inf),  # it passed wherever it was tried
        (goodput_of(0.0, None, 5.0), False, 5.0),  # it failed at the rate to beat
        (goodput_of(0.0, None, None), False, 0.0),  # a lone request is too slow
    ],
)
def test_what_an_outcome_says_at_most(goodput, won, at_most_rps):
    candidate = Known().candidate("", 1.0, 2, bound_rps=7.0)
    outcome = CandidateResult(candidate=candidate, goodput=goodput)
    assert (outcome.won, outcome.at_most_rps) == (won, at_most_rps)
    assert outcome.per_device_rps == (goodput.rps / 2 if won else 0.0)


def test_the_bounds_of_a_unit_are_those_of_its_own_phases():
    layouts = [Parallelism(1), Parallelism(2)]
    # A prefill instance of one device serves 5, one of two 9; decode 3 and 4. In a pool
    # each does at most 1 more.
    rates = [
        {
            layout: PhaseRates(bound_rps=rps, about_rps=rps - 0.5, pooled_rps=rps + 1)
            for layout, rps in zip(layouts, served, strict=True)
        }
        for served in ((5.0, 9.0), (3.0, 4.0))
    ]
    found = joint_candidates(
        problem(devices=4, margin=0.0), "disaggregated", layouts, tuple(rates)
    )
    units = {c.name: (c.bound_rps, c.search.start_rps) for c in found}
    assert units["prefill:tp1,decode:tp1"] == (3.0, 2.5)
    assert units["prefill:tp2,decode:tp1"] == (3.0, 2.5)
    assert units["prefill:tp1,decode:tp2"] == (4.0, 3.5)
    # A pool of two decode instances: 2 x (3 + 1), of three 3 x 4; prefill alone 5.
    assert units["prefill:tp1,2xdecode:tp1"] == (5.0, 4.5)
    assert units["prefill:tp2,2xdecode:tp1"] == (8.0, 5.0)
    assert units["3xprefill:tp1,decode:tp1"] == (3.0, 2.5)
    assert units["2xprefill:tp1,decode:tp2"] == (4.0, 3.5)


def test_a_pool_adds_what_an_instance_does_that_is_always_busy():
    # What keeps it busy if a share of 0.9 is served in time; or its goodput, if more.
    given = problem(layouts=SMALL[:1])
    (candidate,) = phase_candidates(given, "disaggregated", given.layouts, Role.PREFILL)
    busy_rps = candidate.search.capacity_rps() / 0.9
    for goodput, pooled in (
        (goodput_of(1.0, 1.0, 1.2), busy_rps),
        (goodput_of(1.0, 1.0, 2 * busy_rps), 2 * busy_rps),
    ):
        rates = phase_rates([CandidateResult(candidate=candidate, goodput=goodput)])
        assert rates[SMALL[0]].pooled_rps == pytest.approx(pooled)
        assert rates[SMALL[0]].about_rps == 1.0


def test_what_was_not_found_is_about_what_it_would_be_tried_at_or_below_its_bound():
    given = problem(layouts=SMALL[:1])
    (candidate,) = phase_candidates(given, "disaggregated", given.layouts, Role.DECODE)
    first_rps = candidate.search.first_rps()
    for failed_rps, about_rps in (
        (0.5 * first_rps, 0.5 * first_rps),
        (2.0 * first_rps, first_rps),
    ):
        lost = CandidateResult(
            candidate=candidate, goodput=goodput_of(0.0, None, failed_rps)
        )
        rates = phase_rates([lost])[SMALL[0]]
        assert (rates.about_rps, rates.bound_rps) == (about_rps, failed_rps)


# ---- when not to disaggregate --------------------------------------------------------


def winner(given):
    """Of the joint search; candidates of a phase need room for the other."""
    layouts = [layout for layout in given.layouts if layout.devices < given.devices]
    kept = dataclasses.replace(given, layouts=tuple(layouts))
    units = joint_candidates(given, "disaggregated", layouts, phases(kept))
    units += colocated_candidates(given, given.layouts)
    return best_first(units, map, silent)[0].candidate.name


def test_disaggregation_wins_where_prompts_stall_decodes():
    assert "prefill" in winner(problem())


def test_colocation_wins_where_there_is_next_to_nothing_to_decode():
    given = problem(devices=2, layouts=SMALL[:1], slo=SLO(ttft_s=0.3, tpot_s=0.5))
    short = UniformLengths(low=1, high=2)
    workload = dataclasses.replace(given.workload, output=short)
    # The decode instance would idle.
    assert winner(dataclasses.replace(given, workload=workload)) == (
        "vllm_v0 colocated:tp1"
    )


def test_one_device_is_not_disaggregated():
    assert winner(problem(devices=1, layouts=SMALL[:1])) == "vllm_v0 colocated:tp1"


# ---- what is tried -------------------------------------------------------------------


def test_layouts_that_do_not_fit_are_listed_with_the_reason():
    given = problem(layouts=(*SMALL, Parallelism(4, 1), Parallelism(8, 1)), devices=8)
    kept, skipped = given.feasible()
    assert kept == (*SMALL, Parallelism(4, 1))
    assert skipped == {Parallelism(8, 1): "expected tp <= 4, got more"}
    _, skipped = problem(devices=1).feasible()
    assert set(skipped) == {Parallelism(2, 1), Parallelism(1, 2)}
    assert "expected at most 1 devices, got 2" in skipped[Parallelism(2, 1)]


def made_up(layouts):
    """Phases in which a device serves 1 request/s, and up to 2 in a pool."""
    rates = {
        k: PhaseRates(
            bound_rps=k.devices, about_rps=k.devices, pooled_rps=2 * k.devices
        )
        for k in layouts
    }
    return rates, rates


def test_pairs_of_algorithm_2_share_their_nodes():
    layouts = [Parallelism(tp, pp) for tp in (1, 2, 3) for pp in (1, 2, 4)]
    given = problem(devices=8, node_devices=4)
    found = low_affinity_candidates(given, "disaggregated", layouts, made_up(layouts))
    names = {candidate.name: candidate for candidate in found}
    assert set(names) == {
        *("prefill:tp1,decode:tp1", "prefill:tp1,decode:tp2", "prefill:tp2,decode:tp1"),
        *("prefill:tp2,decode:tp2", "prefill:tp1,decode:tp3", "prefill:tp3,decode:tp1"),
        *("prefill:tp1pp2,decode:tp1", "prefill:tp1,decode:tp1pp2"),
        *("prefill:tp1pp2,decode:tp1pp2", "prefill:tp2,decode:tp1pp2"),
        "prefill:tp1pp2,decode:tp2",
        # over two nodes, with even numbers of stages
        *("prefill:tp1pp2,decode:tp2pp2", "prefill:tp2pp2,decode:tp1pp2"),
        *("prefill:tp2pp2,decode:tp2pp2", "prefill:tp1pp2,decode:tp3pp2"),
        *("prefill:tp3pp2,decode:tp1pp2", "prefill:tp1pp4,decode:tp1pp2"),
        *("prefill:tp1pp2,decode:tp1pp4", "prefill:tp1pp4,decode:tp1pp4"),
        *("prefill:tp2pp2,decode:tp1pp4", "prefill:tp1pp4,decode:tp2pp2"),
    }
    # 3 of 4 devices are used in each of two nodes; the fourth has no other use.
    candidate = names["prefill:tp1,decode:tp2"]
    assert (candidate.copies, candidate.devices) == (2, 4.0)
    assert candidate.bound_rps == pytest.approx(1.1)  # of prefill, with the margin
    # On 12 devices, too, one in each node, and not four anywhere.
    twelve = dataclasses.replace(given, devices=12)
    found = low_affinity_candidates(
        twelve, "disaggregated", layouts[:4], made_up(layouts)
    )
    candidate = {c.name: c for c in found}["prefill:tp1,decode:tp2"]
    assert (candidate.copies, candidate.devices) == (3, 4.0)
    # With a rate to serve there are as many nodes as it takes.
    given = dataclasses.replace(given, rate_rps=9.0)
    found = low_affinity_candidates(given, "disaggregated", layouts, made_up(layouts))
    candidate = {c.name: c for c in found}["prefill:tp1,decode:tp2"]
    assert candidate.devices == 3


def test_copies_that_share_nodes_leave_devices_over():
    given = problem(devices=12, node_devices=4)
    assert given.copies(3) == 4  # anywhere
    assert given.copies(3, nodes=1) == 3  # one in each node
    assert given.copies(6, nodes=2) == 1  # the third node has no partner
    assert problem(devices=3, node_devices=4).copies(2, nodes=1) == 1


def test_units_of_the_joint_search():
    layouts = [Parallelism(1), Parallelism(2)]
    found = joint_candidates(
        problem(devices=4), "disaggregated", layouts, made_up(layouts)
    )
    names = {c.name: (c.copies, c.devices, round(c.bound_rps, 3)) for c in found}
    assert names == {
        "prefill:tp1,decode:tp1": (2, 2.0, 1.1),
        "2xprefill:tp1,decode:tp1": (1, 4.0, 1.1),
        "3xprefill:tp1,decode:tp1": (1, 4.0, 1.1),
        "prefill:tp1,2xdecode:tp1": (1, 4.0, 1.1),
        "prefill:tp1,3xdecode:tp1": (1, 4.0, 1.1),
        "prefill:tp1,decode:tp2": (1, 4.0, 1.1),
        "2xprefill:tp1,decode:tp2": (1, 4.0, 2.2),
        "prefill:tp2,decode:tp1": (1, 4.0, 1.1),
        "prefill:tp2,2xdecode:tp1": (1, 4.0, 2.2),
        "prefill:tp2,decode:tp2": (1, 4.0, 2.2),
    }


@pytest.mark.parametrize(
    ("role", "slo"),
    [
        (Role.PREFILL, SLO(ttft_s=0.3, tpot_s=math.inf)),
        (Role.DECODE, SLO(ttft_s=math.inf, tpot_s=0.025)),
    ],
)
def test_the_candidates_of_a_phase_are_one_instance_of_each_layout(role, slo):
    found = phase_candidates(problem(node_devices=1), "disaggregated", SMALL, role)
    assert [(c.name, c.devices, c.copies) for c in found] == [
        (f"{role}:tp1", 1, 1),
        (f"{role}:tp2", 2, 1),
        (f"{role}:tp1pp2", 2, 1),
    ]
    assert [c.layout for c in found] == list(SMALL)
    assert {c.search.slo for c in found} == {slo}
    assert [c.search.num_requests for c in found] == [120, 240, 240]
    assert {str(c.search.simulated.deployment) for c in found} == {
        f"prefill:{k},decode:{k}" for k in ("tp1", "tp2", "tp1pp2")
    }


def test_longer_runs_for_more_devices():
    given = problem(node_devices=2)
    for devices, expected in ((1, 120), (2, 120), (3, 240), (8, 480)):
        asked = given.ask(build(pair(Parallelism(1), Parallelism(1))), devices)
        assert asked.num_requests == expected


# ---- replicas ------------------------------------------------------------------------


class OfDevices(CandidateResult):
    """An outcome of a given goodput per device."""

    per_device_rps = property(lambda self: self.goodput)


def known(per_device_rps, devices):
    search = problem().ask(build(Deployment.parse("prefill:tp1,decode:tp1")), 1)
    candidate = Candidate(name="", search=search, devices=devices)
    return OfDevices(candidate=candidate, goodput=per_device_rps)


@pytest.mark.parametrize(
    ("prefill", "decode", "limit", "counts"),
    [
        # DistServe's Fig. 1: 5.6 and 10 requests/s a device; 2 + 1 serve 10.
        ((5.6, 1), (10.0, 1), {"devices": 3}, (2, 1)),
        ((5.6, 1), (10.0, 1), {"rate_rps": 10.0}, (2, 1)),
        ((5.6, 1), (10.0, 1), {"rate_rps": 11.3}, (3, 2)),
        # 8 prefill of 2 and 2 decode of 8: min(8 x 2, 2 x 10) on 32.
        ((1.0, 2), (1.25, 8), {"devices": 32}, (8, 2)),
        # min(3, 4): a fourth device of prefill would serve no more.
        ((1.0, 1), (1.0, 3), {"devices": 7}, (3, 1)),
        ((1.0, 4), (1.0, 4), {"devices": 7}, (0, 0)),
        # Just one of each.
        ((1.0, 3), (1.0, 1), {"devices": 4}, (1, 1)),
        ((1.0, 1), (1.0, 3), {"devices": 4}, (1, 1)),
    ],
)
def test_replicas(prefill, decode, limit, counts):
    assert replicas(known(*prefill), known(*decode), **limit) == counts


def test_no_replicas_of_nothing():
    with pytest.raises(ValueError, match="goodput > 0 of both phases"):
        replicas(known(0.0, 1), known(1.0, 1), devices=4)


@pytest.mark.parametrize(
    "change",
    [
        {"devices": 0},
        {"margin": -0.1},
        {"rate_rps": math.inf},
        {"rate_rps": math.nan},
        {"rate_rps": 0.0},
    ],
)
def test_bad_problems_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected"):
        problem(**change)
