"""More seeds: when they are added, and to whom; then all layouts."""

import dataclasses

import pytest

from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.intervals import look_confidence
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.search import cells, layouts
from disagg_jax.search.cells import compare, tell_apart
from disagg_jax.search.comparison import (
    ComparisonSpec,
    fitting_looks,
    judge,
    search_system,
    system_searches,
)
from disagg_jax.search.goodput import find_goodput
from disagg_jax.search.layouts import with_all_layouts
from disagg_jax.search.maps import UNCLEAR, Cell, slos_map
from disagg_jax.workload.lengths import FixedLengths
from disagg_jax.workload.traces import TraceRow
from disagg_jax.workload.workload import RandomWorkload, TraceWorkload
from tests.linear_simulation import LINEAR

CELL = Cell(
    workload=RandomWorkload(
        prompt=FixedLengths(tokens=100), output=FixedLengths(tokens=1)
    ),
    slo=SLO(ttft_s=0.5, tpot_s=1.0),
)
SPEC = ComparisonSpec(
    simulation=LINEAR,
    devices=2,
    systems={n: SYSTEMS[n] for n in ("vllm_v0", "sarathi_serve", "disaggregated")},
    sizes=(100,),
    num_requests=60,
    looks=(2, 4, 6),
)


def results(**per_seed_rps):
    found = [search_system(each) for each in system_searches(SPEC, CELL)]
    return [
        dataclasses.replace(one, per_seed_rps=per_seed_rps.get(one.system, (0.1, 0.1)))
        for one in found
    ]


class Known:
    """A mapper that gives each added seed the next goodput of its system."""

    def __init__(self, monkeypatch, **rps):
        self.asked = []
        self._rps = rps
        monkeypatch.setattr(cells, "find_goodput", self)

    def __call__(self, search):
        roles = {str(i.role) for i in search.simulated.deployment.instances}
        name = (
            "disaggregated"
            if "prefill" in roles
            else type(next(iter(search.simulated.policies.values()))).__name__
        )
        (seed,) = search.seeds
        self.asked.append((name, seed, search.start_rps))
        found = find_goodput(dataclasses.replace(search, num_requests=5))
        rps = 2 * self._rps[name][seed]
        estimate = dataclasses.replace(
            found.found, interval=dataclasses.replace(found.found.interval, mean=rps)
        )
        return dataclasses.replace(found, found=estimate)


def told(monkeypatch, start, more, stop=lambda: False):
    known = Known(monkeypatch, **more)
    searches = system_searches(SPEC, CELL)
    found = tell_apart(results(**start), searches, map, stop=stop)
    return known, {one.system: one.per_seed_rps for one in found}


EVEN = {"vllm_v0": (1.0, 2.0), "disaggregated": (2.0, 1.0)}


def test_two_that_are_told_apart_get_no_more_seeds(monkeypatch):
    start = {"vllm_v0": (2.0, 2.02), "disaggregated": (1.0, 1.01)}
    known, found = told(monkeypatch, start, {})
    assert known.asked == [] and found["vllm_v0"] == (2.0, 2.02)


def test_the_pair_gets_seeds_until_it_is_told_apart(monkeypatch):
    """Ratios of 2 and 1/2; two seeds of 2 more leave 1 in the interval, four do not."""
    more = {"disaggregated": [0, 0, 2, 2, 2, 2], "PrefillFirst": [0, 0, 1, 1, 1, 1]}
    known, found = told(monkeypatch, EVEN, more)
    assert found["disaggregated"] == (2.0, 1.0, 2.0, 2.0, 2.0, 2.0)
    assert found["sarathi_serve"] == (0.1, 0.1)
    # Each seed is searched alone, from the mean of the two devices so far.
    assert known.asked[:2] == [
        ("disaggregated", 2, 3.0),
        ("disaggregated", 3, 3.0),
    ] or (known.asked[:2] == [("PrefillFirst", 2, 3.0), ("PrefillFirst", 3, 3.0)])
    assert len(known.asked) == 8


def test_who_becomes_the_best_of_its_kind_gets_them_too(monkeypatch):
    start = {**EVEN, "sarathi_serve": (1.4, 1.4)}
    more = {
        "disaggregated": [0, 0, 2, 1, 2, 1],
        "PrefillFirst": [0, 0, 0.5, 0.5, 0.5, 0.5],
        "SarathiServe": [0, 0, 1.4, 1.4, 1.4, 1.4],
    }
    known, found = told(monkeypatch, start, more)
    names = {name for name, *_ in known.asked}
    assert len(found["vllm_v0"]) == 4 and len(found["sarathi_serve"]) == 6, names


def test_the_time_that_is_spent_ends_it(monkeypatch):
    known, found = told(monkeypatch, EVEN, {}, stop=lambda: True)
    assert known.asked == [] and len(found["vllm_v0"]) == 2


def test_added_seeds_are_as_good_as_searched_at_once():
    """The search of a seed alone crosses the target where that of several does."""
    (search, *_) = system_searches(SPEC, CELL)
    (option,) = search.options
    both = find_goodput(dataclasses.replace(option.candidate.search, seeds=(0, 1)))
    for seed, rps in enumerate(both.found.per_seed_rps):
        alone = dataclasses.replace(
            option.candidate.search, seeds=(seed,), start_rps=both.rps
        )
        assert find_goodput(alone).rps == pytest.approx(rps, rel=0.08)


def test_intervals_are_corrected_for_the_looks():
    (one, *_) = results(vllm_v0=(1.0, 1.1))
    assert one.confidence == look_confidence(3)
    once = dataclasses.replace(one, looks=(2,))
    width, narrow = (r.goodput.high - r.goodput.low for r in (one, once))
    assert width > 2 * narrow
    ratios = [
        judge([dataclasses.replace(r, looks=looks) for r in results(**EVEN)]).over.ratio
        for looks in ((2, 4, 6), (2,))
    ]
    assert ratios[0].high > 100 * ratios[1].high
    assert judge(results(**EVEN)).wants_seeds
    assert judge(results(**EVEN)).verdict == UNCLEAR


@pytest.mark.parametrize(
    ("rows", "looks"), [(1000, (4, 8, 16)), (75, (4, 7)), (35, (3,)), (15, (4,))]
)
def test_a_trace_has_looks_as_its_rows_allow(rows, looks):
    """10 requests a run: 7 runs of their own in 75 rows; one run is no sample."""
    trace = TraceWorkload(rows=tuple(TraceRow(float(i), 5, 5) for i in range(rows)))
    assert fitting_looks((4, 8, 16), trace, 10) == looks


def test_cells_that_the_time_does_not_suffice_for_are_left_out():
    each = slos_map([0.3, 0.5, 0.7], [1.0], CELL.workload, "prompts")
    spec = dataclasses.replace(SPEC, looks=(2,), num_requests=20)
    spent = iter([False, False, True])
    (grid,) = compare(spec, [each], map, stop=lambda: next(spent))
    assert list(grid) == [(0, 0), (1, 0)]
    (first,) = compare(spec, [each], map, stop=lambda: True)
    assert list(first) == [(0, 0)]


# ---- layouts -------------------------------------------------------------------------


def row(name, goodput=None, why="beaten", at_most=5.0):
    known = {"candidate": name, "devices": 2, "num_requests": 60, "seeds": [0, 1]}
    found = {"goodput": goodput, "at_most": at_most, "parameters": ()}
    return {**known, **found, **({} if goodput else {"why": why})}


PAIR = "prefill:tp1,decode:tp1"


def with_dropped_layouts(monkeypatch, **changes):
    """Three systems: of two the layout was dropped, the third meets no target alone."""
    searches = system_searches(SPEC, CELL)
    asked = []

    def noted(search):
        asked.append(search)
        return find_goodput(search)

    monkeypatch.setattr(layouts, "find_goodput", noted)
    rows = (
        row("2xcolocated:tp1"),
        row("2xcolocated:tp1", why="bound"),
        row(PAIR, why="alone it needs 2"),
    )
    found = [
        dataclasses.replace(one, candidates=(each,))
        for one, each in zip(results(), rows, strict=True)
    ]
    return asked, found, with_all_layouts(found, searches, map, **changes)


def test_layouts_that_were_dropped_are_searched_in_full(monkeypatch):
    """Those of all systems, but for what cannot meet the targets even alone."""
    asked, found, done = with_dropped_layouts(monkeypatch)
    (search, *_) = system_searches(SPEC, CELL)
    known = search.options[0].candidate.search
    assert [(each.plan, each.seeds) for each in asked] == [(known.plan, (0, 1))] * 2
    for one in done[:2]:
        (shown,) = one.candidates
        assert shown["goodput"] > 5 and shown["interval"][0] <= shown["goodput"]
        assert shown["bracketed"]
    assert done[2] == found[2]
    assert [len(list(layouts.dropped(one))) for one in found] == [1, 1, 0]
    assert not any(list(layouts.dropped(one)) for one in done)


def test_layouts_that_there_is_no_time_for_keep_their_bounds(monkeypatch):
    asked, found, done = with_dropped_layouts(monkeypatch, stop=lambda: True)
    assert len(asked) == 1
    assert done[0].candidates[0]["goodput"] > 5
    assert done[1].candidates == found[1].candidates


def test_the_best_layout_stays_first_and_the_others_are_ordered():
    (search, *_) = system_searches(SPEC, CELL)
    (one, *_) = results()
    rows = (row("a", 3.0), row("b", 1.0), row("c", why="x"), row("d", 2.0))
    (done,) = with_all_layouts(
        [dataclasses.replace(one, candidates=rows)], [search], map
    )
    assert [each["candidate"] for each in done.candidates] == ["a", "d", "b", "c"]
