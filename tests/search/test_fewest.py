"""The fewest devices for a rate: the search by hand, and answers by arithmetic."""

import dataclasses
import itertools
import math

import pytest

from disagg_jax.deployment import Role
from disagg_jax.metrics.attainment import SLO
from disagg_jax.scheduling import SYSTEMS, get_system
from disagg_jax.search import fewest
from disagg_jax.search.comparison import ComparisonSpec, search_system, system_searches
from disagg_jax.search.fewest import (
    Demand,
    FewestSearch,
    Unit,
    fewest_devices,
    fewest_search,
    lowest,
)
from disagg_jax.search.maps import Cell
from disagg_jax.workload.lengths import FixedLengths
from disagg_jax.workload.traces import TraceRow
from disagg_jax.workload.workload import RandomWorkload, TraceWorkload
from tests.linear_simulation import LINEAR

# A prompt of 100 tokens takes 0.1 s, so a device prefills up to 10 a second.
WORKLOAD = RandomWorkload(
    prompt=FixedLengths(tokens=100), output=FixedLengths(tokens=1)
)
CELL = Cell(workload=WORKLOAD, slo=SLO(ttft_s=0.5, tpot_s=1.0))
SPEC = ComparisonSpec(
    simulation=LINEAR,
    devices=2,
    systems={name: SYSTEMS[name] for name in ("vllm_v0", "disaggregated")},
    sizes=(100,),
    num_requests=150,
    looks=(2,),
)


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("least", [*range(9), None])
def test_the_lowest_that_passes_is_found_from_anywhere(start, least):
    tried = []

    def passes(at):
        tried.append(at)
        return least is not None and at >= least

    assert lowest(passes, start, 9) == least
    assert len(set(tried)) == len(tried), "a deployment was simulated twice"


def test_a_good_guess_needs_two_trials():
    tried = []

    def passes(at):
        tried.append(at)
        return at >= 500

    assert lowest(passes, 500, 1000) == 500
    assert tried == [500, 499]


def test_a_unit_is_repeated_in_all_ways_that_use_all_devices():
    """Of tp1 + tp2 on 5 devices: 1 + 2 x 2 and 3 + 2, at 3 and 4 for an instance."""
    unit = Unit(tp=(1, 2), capacity_rps=(3.0, 4.0))
    found = {str(deployment): rps for rps, deployment in unit.deployments(5)}
    assert found == {
        "prefill:tp1,2xdecode:tp2": 3.0,
        "3xprefill:tp1,decode:tp2": 4.0,
    }
    alone = Unit(tp=(2,), capacity_rps=(3.0,))
    assert [(rps, str(d)) for rps, d in alone.deployments(4)] == [
        (6.0, "2xcolocated:tp2")
    ]
    assert list(alone.deployments(3)) == []


def searched(rate_rps, max_devices=12, system=0, cell=CELL, spec=SPEC):
    searches = system_searches(spec, cell)
    demand = Demand.of(cell, rate_rps, searches[system], max_devices)
    result = search_system(searches[system])
    return fewest_search(spec, cell, demand, searches[system], result)


def test_colocated_devices_add_up():
    """26 requests/s want three devices at least, and three are 87 % busy."""
    found = fewest_devices(searched(26.0))
    assert found.best.devices in (3, 4) and found.best.attainment >= 0.9
    assert found.best.deployment == f"{found.best.devices}xcolocated:tp1"
    assert found.bound == 2  # 10 a device by capacity, x 1.5 as a margin
    assert found.below.devices == found.best.devices - 1
    assert found.below.attainment < 0.9
    # A prompt takes 0.1 s, alone or not.
    assert found.best.ttft_s["p50"] >= 0.1
    assert found.best.ttft_s["p90"] <= 0.5


def test_without_decodes_the_rest_of_the_devices_of_a_pair_prefill():
    """Three or four prefill instances, as many as of colocated ones, and a decode."""
    colocated = fewest_devices(searched(26.0)).best.devices
    found = fewest_devices(searched(26.0, system=1))
    assert found.best.devices == colocated + 1
    assert found.best.deployment == f"{colocated}xprefill:tp1,decode:tp1"
    assert found.least == 2


def test_what_the_maximum_cannot_serve_is_not_tried_where_capacity_says_so():
    found = fewest_devices(searched(200.0, max_devices=4))
    assert (found.best, found.bound, found.trials) == (None, None, ())
    near = fewest_devices(searched(45.0, max_devices=4))
    assert near.best is None and near.bound == 3
    assert near.below.devices == 4 and near.below.attainment < 0.9


def test_nobody_meets_targets_below_the_unloaded_latency():
    cell = Cell(workload=WORKLOAD, slo=SLO(ttft_s=0.05, tpot_s=1.0))
    found = fewest_devices(searched(1.0, cell=cell))
    assert (found.best, found.least) == (None, 0)


def test_a_trace_is_served_once_from_its_first_row_to_its_last(monkeypatch):
    """At its own rate its times stay: bursts of five that a mean rate would hide."""
    times = [10 * burst + 0.01 * i for burst in range(8) for i in range(5)]
    trace = TraceWorkload(rows=tuple(TraceRow(t, 100, 1) for t in times))
    assert trace.rate_rps == pytest.approx(39 / 70.04)
    cell = Cell(workload=trace, slo=SLO(ttft_s=0.25, tpot_s=1.0))
    task = searched(trace.rate_rps, cell=cell)
    assert (task.demand.num_requests, task.demand.seeds) == (40, (0,))
    runs = []
    watch_run = fewest.watch_run

    def watched(run):
        runs.append(run.point.requests())
        return watch_run(run)

    monkeypatch.setattr(fewest, "watch_run", watched)
    found = fewest_devices(task)
    assert [r.arrival_s for r in runs[0]] == pytest.approx(times)
    # A device prefills two of a burst within 0.25 s, so five want three devices.
    assert found.best.devices == 3 and found.best.attainment == 1.0


def test_a_system_is_tried_by_what_its_layouts_promise():
    """The share of the capacity that was its goodput orders the deployments."""
    low = Unit(tp=(1,), capacity_rps=(10.0,), share=0.2)
    high = Unit(tp=(2,), capacity_rps=(15.0,), share=0.9)
    ranked = fewest._ranked((low, high), 4)
    assert [str(each.deployment) for each in ranked] == [
        *("2xcolocated:tp2", "4xcolocated:tp1")
    ]
    assert [each.promise_rps for each in ranked] == [27.0, 8.0]


# A request has 19 decode steps of 10 ms, and a decode instance has four at once: 21 a
# second.
TWO_PHASES = dataclasses.replace(
    SPEC,
    systems={
        "vllm_v0": SYSTEMS["vllm_v0"],
        "disaggregated": get_system("disaggregated", decode={"max_seqs": 4}),
    },
)
DECODED = Cell(
    workload=RandomWorkload(
        prompt=FixedLengths(tokens=100), output=FixedLengths(tokens=20)
    ),
    slo=SLO(ttft_s=0.5, tpot_s=0.02),
)


def test_what_a_phase_alone_cannot_serve_is_not_simulated_as_a_whole():
    """The answer is that of trying everything, by far fewer simulations."""
    task = searched(50.0, system=1, cell=DECODED, spec=TWO_PHASES)
    assert fewest._least_alone(task, Role.PREFILL, 1) in (4, 5, 6)
    assert fewest._least_alone(task, Role.DECODE, 1) == 3
    found = fewest_devices(task)
    every = [
        fewest._trial(task, devices, each.deployment)
        for devices in range(2, found.best.devices + 1)
        for each in fewest._ranked(task.units, devices)
    ]
    assert found.best.devices == min(each.devices for each in every if each.served)
    assert len(found.trials) < len(every) / 5
    assert found.least == 2 and found.bound >= 7


def test_a_phase_that_no_number_of_instances_serves_leaves_nothing_to_try():
    """Five prefill instances at the most, which serve 50 requests/s for long."""
    found = fewest_devices(searched(74.0, max_devices=6, system=1))
    assert (found.best, found.bound, found.trials) == (None, None, ())


def test_all_deployments_of_a_number_of_devices_are_tried(monkeypatch):
    """What promises the least of all that may is the one that serves the rate."""
    task = searched(26.0, max_devices=6, system=1)
    tried = []

    def few_prefill(task, devices, deployment):
        served = str(deployment) == "2xprefill:tp1,4xdecode:tp1"
        tried.append(str(deployment))
        return fewest.Trial(
            devices=devices,
            deployment=str(deployment),
            attainment=float(served),
            served=served,
        )

    monkeypatch.setattr(fewest, "_trial", few_prefill)
    monkeypatch.setattr(fewest, "_least_alone", lambda *_: 1)
    found = fewest_devices(task)
    assert found.best.deployment == tried[-1] == "2xprefill:tp1,4xdecode:tp1"
    # One prefill instance cannot, with a capacity of 10.
    assert tried[-4:-1] == [
        f"{n}xprefill:tp1,{decode}:tp1"
        for n, decode in ((5, "decode"), (4, "2xdecode"), (3, "3xdecode"))
    ]


def test_every_unit_of_a_search_has_its_layouts():
    task = searched(5.0, system=1)
    assert isinstance(task, FewestSearch)
    (unit,) = task.units
    assert unit.tp == (1, 1) and unit.capacity_rps == (pytest.approx(10.0), math.inf)
    assert 0 < unit.share <= 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_rps": 0.0}, "rate: expected > 0 requests/s, and finite, got 0.0"),
        ({"rate_rps": math.inf}, "rate: expected > 0 requests/s, and finite, got inf"),
        ({"max_devices": 0}, "max_devices: expected >= 1, got 0"),
    ],
)
def test_bad_questions(changes, message):
    fields = {"rate_rps": 1.0, "num_requests": 1, "seeds": (0,)}
    with pytest.raises(ValueError, match=message):
        Demand(**(fields | changes))


def test_a_trace_without_times_has_no_rate_of_its_own():
    rows = [TraceRow(math.nan, 5, 5)] * 3
    assert TraceWorkload(rows=tuple(rows)).rate_rps is None


def test_roles_are_those_of_the_system():
    kinds = [Role.COLOCATED in SPEC.systems[name] for name in SPEC.systems]
    assert kinds == [True, False]
    assert list(itertools.chain(*(u.tp for u in searched(5.0).units))) == [1]
