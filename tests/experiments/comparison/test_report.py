"""The tables and labels of a comparison from cells made by hand."""

import dataclasses
import pathlib

import pytest

from disagg_jax.scheduling import DISAGGREGATED
from disagg_jax.search.comparison import (
    POLICIES,
    ComparisonSpec,
    SystemResult,
    judge,
)
from disagg_jax.search.maps import slos_map
from disagg_jax.search.rates import SearchPlan
from disagg_jax.workload import FixedLengths, RandomWorkload, TraceWorkload
from disagg_jax.workload.traces import TraceRow
from experiments.comparison import report
from experiments.configs.named_simulations import get_simulation
from experiments.runs.folder import plain

WORKLOAD = RandomWorkload(prompt=FixedLengths(tokens=9), output=FixedLengths(tokens=3))


def found(system, *per_seed_rps, needs=0.5, **best):
    return SystemResult(
        system=system,
        colocated=system != DISAGGREGATED,
        deployment=f"{system}'s",
        parameters=(f"{system}'s reason", "another"),
        per_seed_rps=per_seed_rps,
        needs=needs,
        num_requests=123,
        candidates=({"steady": True, "bracketed": True, "resolved": True, **best},),
    )


# Apart is the best; of the colocated ones, vllm_v0. Three seeds each.
CLEAR = (
    found("vllm_v0", 1.0, 1.1, 0.9),
    found("orca", 0.5, 0.5, 0.5, resolved=False, steady=False),
    found(DISAGGREGATED, 2.0, 2.2, 1.8),
)
# One seed says otherwise.
CLOSE = (
    found("vllm_v0", 1.0, 1.1, 0.9),
    found("orca", 3.0, 3.1, 2.9),
    found(DISAGGREGATED, 2.9, 3.2, 2.75),
)
NOBODY = tuple(
    found(name, 0.0, 0.0, 0.0, needs=needs)
    for name, needs in (("vllm_v0", 2.5), ("orca", 1.25), (DISAGGREGATED, 3.0))
)
SPEC = ComparisonSpec(
    simulation=get_simulation("opt13b_a100"),
    devices=4,
    systems={name: POLICIES[name] for name in ("vllm_v0", "orca", DISAGGREGATED)},
    sizes=(128,),
    plan=SearchPlan(target=0.8),
    looks=(3,),
)
MAP = slos_map([0.25, 0.5, 1.0], [0.04], WORKLOAD, "mine")
GRID = {(0, 0): NOBODY, (1, 0): CLOSE, (2, 0): CLEAR}
TEXT = report.text(SPEC, [MAP], [GRID])


def rows(title):
    table = TEXT.split(f"{title}\n")[1].split("\n\n")[0]
    return [line.split() for line in table.splitlines()]


def test_a_cell_has_its_winner_its_goodput_and_both_ratios():
    nobody, close, clear = rows("map of targets: workload mine")[1:]
    assert nobody == [
        *("0.25", "0.04", "123", "3", "-", "-", "-", "-", "infeasible:", "even"),
        *("alone", "orca", "needs", "1.25", "x", "the", "targets"),
    ]
    assert close == [
        *("0.5", "0.04", "123", "3", "orca", "3", "[2.75,", "3.25]"),
        *("1.02", "[0.91,", "1.14]", "(unclear)", DISAGGREGATED),
        *("0.98", "[0.88,", "1.10]", "(unclear)", "orca", "no", "clear", "winner"),
    ]
    assert clear == [
        *("1", "0.04", "123", "3", DISAGGREGATED, "2", "[1.5,", "2.5]"),
        *("2.00", "[2.00,", "2.00]", "vllm_v0", "2.00", "[2.00,", "2.00]", "vllm_v0"),
        DISAGGREGATED,
    ]


def test_goodputs_are_means_over_the_seeds_by_system():
    assert rows("goodput, requests/s per device") == [
        [*("TTFT", "target", "TPOT", "target", "vllm_v0", "orca"), DISAGGREGATED],
        ["0.25", "0.04", "0", "0", "0"],
        ["0.5", "0.04", "1", "3", "2.95"],
        ["1", "0.04", "1", "0.5", "2"],
    ]


def test_parameters_are_shown_with_reasons_and_doubts():
    details = TEXT.split("parameters, map of targets\n")[1].split("\n\n")[0]
    for line in (
        "TTFT target 1, TPOT target 0.04 s",
        "  orca           orca's: 0.5/s, not steady, not resolved; orca's reason; "
        "another",
        "  disaggregated  disaggregated's: 2/s; disaggregated's reason; another",
        "  vllm_v0        vllm_v0's: no goodput, alone it needs 2.5 x the targets; "
        "vllm_v0's reason; another",
    ):
        assert line in details.splitlines()


def test_parameters_begin_together_whatever_the_names():
    grid = {(2, 0): (found("disaggregated_chunked", 1.0), found("orca", 1.0))}
    details = report.text(SPEC, [MAP], [grid]).split("parameters, map of targets\n")[1]
    rows = [line for line in details.splitlines() if line.endswith("reason; another")]
    assert [row.index("'s: ") - len(row.split()[0]) for row in rows] == [
        len("  disaggregated_chunked  ")
    ] * 2


def test_the_head_says_what_was_asked():
    for said in (
        "opt-13b on 4 devices, fitted/distserve, KV over nvlink-a100; simulated",
        "requests/s per device at which 80% of the requests meet both targets",
        "3 seeds; 95 % intervals over seeds; N requests a run",
        "at once, at most: vllm_v0 256, orca 128, disaggregated 256;",
    ):
        assert said in TEXT.split("\n\n")[0]


def test_the_record_has_the_numbers_of_the_table():
    content = report.record(SPEC, [MAP], [GRID])
    (made,) = content["maps"]
    nobody, close, clear = made["cells"]
    assert (nobody["winner"], nobody["over_runner_up"]["ratio"]) == (None, None)
    assert nobody["why_infeasible"] == "even alone orca needs 1.25 x the targets"
    assert (close["winner"], close["why_infeasible"]) == ("orca", None)
    assert close["best_colocated"] == "orca" and clear["best_colocated"] == "vllm_v0"
    assert (clear["TTFT target"], clear["TPOT target"]) == (1.0, 0.04)
    assert clear["over_colocated"]["ratio"]["mean"] == pytest.approx(2.0)
    assert clear["over_runner_up"]["clear"] and not close["over_runner_up"]["clear"]
    assert [one["system"] for one in clear["systems"]] == [
        *(DISAGGREGATED, "vllm_v0", "orca")
    ]
    assert clear["systems"][1]["goodput"]["mean"] == pytest.approx(1.0)
    asked = content["question"]
    assert (asked["devices"], asked["looks"], asked["sizes"]) == (4, [3], [128])
    assert asked["plan"]["target"] == 0.8
    assert made["sentence"] == report.sentences([MAP], [GRID])[0]


# -- runs that are too short, and attainment that rises --------------------------------

RISES = "attainment is not monotone in the rate: 50.0% at 1, 90.0% at 2"


def short(cell, needed):
    return tuple(dataclasses.replace(one, needed_requests=needed) for one in cell)


def test_bounded_runs_are_said_with_the_shortest_of_them():
    """123 requests of 246 are half, of 492 a quarter; the last cell's are enough."""
    grid = {
        (0, 0): short(CLEAR, 246),
        (1, 0): short(CLEAR, 492),
        (2, 0): short(CLEAR, 123),
    }
    said = report.bounded(grid)
    assert "in 2 of 3 cells runs have 123 requests" in said
    assert "are as little as 25.0% as long as their targets ask for" in said
    assert report.bounded({(0, 0): short(CLEAR, 122.9)}) == ""
    endless = report.bounded({(0, 0): short(CLEAR, float("inf"))})
    assert "are never as long as their targets" in endless
    for sentences in (
        report.sentences([MAP], [grid]),
        report.sentences([MAP], [{(0, 0): grid[0, 0]}]),
    ):
        assert "\nBounded: in " in sentences[0]
    table = report.text(SPEC, [MAP], [grid])
    assert " 123 of 246 " in table and " 123 of 492 " in table


def test_bounded_runs_are_marked_in_the_picture_and_the_record(monkeypatch):
    grid = {(0, 0): short(CLEAR, 246), (1, 0): CLEAR}
    ((panel,), _) = drawn(monkeypatch, [MAP], [grid])
    assert panel.cells[0, 0].text.splitlines()[1] == "2/s \u2020"
    assert panel.cells[1, 0].text.splitlines()[1] == "2/s"
    assert panel.title.endswith("\n\u2020 runs are shorter than the targets ask for")
    ((panel,), _) = drawn(monkeypatch, [MAP], [GRID])
    assert "\u2020" not in panel.title
    cells = report.record(SPEC, [MAP], [grid])["maps"][0]["cells"]
    assert [cell["bounded"] for cell in cells] == [True, False]
    assert [cell["num_requests"] for cell in cells] == [123, 123]
    assert [cell["notes"] for cell in cells] == [
        ["runs bounded to 123 of 246 requests"],
        [],
    ]


def test_attainment_that_rises_is_said_of_its_system():
    rises = (found("vllm_v0", 1.0, 1.1, 0.9, inversion=RISES), *CLEAR[1:])
    assert report.answer(rises).endswith(f"\nvllm_v0: {RISES}.")
    assert RISES not in report.answer(CLEAR)
    grid = {(0, 0): rises}
    details = report.text(SPEC, [MAP], [grid])
    assert f"  vllm_v0        vllm_v0's: 1/s, {RISES}; vllm_v0's reason" in details
    (cell,) = report.record(SPEC, [MAP], [grid])["maps"][0]["cells"]
    assert cell["notes"] == [f"vllm_v0: {RISES}"]


def test_seeds_that_share_requests_give_no_interval_and_say_so():
    shared = tuple(dataclasses.replace(f, why_dependent="runs share") for f in CLEAR)
    answer = report.answer(shared)
    assert " No interval: runs share." in answer and "[" not in answer
    assert "No interval" not in report.answer(CLEAR)
    assert report.notes(MAP, {(0, 0): shared}) == ["no interval: runs share"]
    assert report.notes(MAP, GRID) == []


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (
            CLEAR,
            "disaggregated (disaggregated's) serves the most: 2 [1.5, 2.5] requests/s "
            "per device.\nDisaggregated over vllm_v0, the best colocated system: 2.00 "
            "[2.00, 2.00]: disaggregate.",
        ),
        (
            (CLEAR[0], found(DISAGGREGATED, 0.5, 0.55, 0.45)),
            "vllm_v0 (vllm_v0's) serves the most: 1 [0.752, 1.25] requests/s per "
            "device.\nDisaggregated over vllm_v0, the best colocated system: 0.50 "
            "[0.50, 0.50]: do "
            "not disaggregate.",
        ),
        (NOBODY, "Nobody: even alone orca needs 1.25 x the targets."),
    ],
)
def test_a_single_cell_has_an_answer(cell, said):
    assert report.answer(cell) == said
    assert report.sentences([MAP], [{(0, 0): cell}]) == [said]


# Three colocated systems.
ALIKE = (
    found("vllm_v0", 1.0, 1.1, 0.9),
    found("vllm_v1", 2.0, 2.2, 1.8),
    found("orca", 1.5, 1.7, 1.4),
)
EVEN = (found("vllm_v0", 1.0, 1.1, 0.9), found("vllm_v1", 1.1, 1.0, 0.9))
ONE_KIND = dataclasses.replace(
    SPEC, systems={name: POLICIES[name] for name in ("vllm_v0", "vllm_v1", "orca")}
)


def test_of_one_kind_the_answer_is_who_wins():
    assert report.answer(ALIKE) == (
        "vllm_v1 (vllm_v1's) serves the most: 2 [1.5, 2.5] requests/s per device.\n"
        "vllm_v1 over orca: 1.30 [1.24, 1.37]: vllm_v1 wins."
    )
    assert ": no clear winner. After 3 seeds, even 1000" in report.answer(EVEN)
    assert "isaggregate" not in report.answer(EVEN)


def test_of_one_kind_a_map_says_who_wins_where():
    grid = {(0, 0): EVEN, (1, 0): ALIKE, (2, 0): ALIKE}
    (said,) = report.sentences([MAP], [grid])
    assert said == (
        "vllm_v1 wins with TTFT target >= 0.5 s (of 3 cells, workload mine: "
        "vllm_v0 0, vllm_v1 2, no clear winner 1, infeasible 0).\nUndecided: 1 of 3 "
        "cells: the best system over the second is 0.79 to 1.27 there. After 3 seeds, "
        "even 1000 would probably not tell."
    )
    (said,) = report.sentences([MAP], [{(0, 0): EVEN, (1, 0): EVEN}])
    assert said.startswith("No cell has a clear winner (of 2 cells, workload mine: ")


def test_of_one_kind_tables_and_pictures_have_no_disaggregation(monkeypatch):
    idle = [found(f.system, 0.0, 0.0, 0.0, needs=2.0) for f in ALIKE]
    grid = {(0, 0): ALIKE, (1, 0): idle}
    shown = report.text(ONE_KIND, [MAP], [grid])
    assert "isaggregated" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("0.25 "))
    assert row.split()[-2:] == ["orca", "vllm_v1"]  # the runner-up and the verdict
    said = []
    monkeypatch.setattr(report, "draw", lambda panels, *_, **__: said.extend(panels))
    report.plot(ONE_KIND, [MAP], [grid], pathlib.Path("x.png"))
    (panel,) = said
    assert panel.cells[0, 0].text == "vllm_v1\n2/s\nover orca 1.30\n[1.24, 1.37]"
    assert panel.hatched == "no clear winner"
    assert not any("disaggregated" in note for note in panel.notes)
    (cell, _) = report.record(ONE_KIND, [MAP], [grid])["maps"][0]["cells"]
    assert (cell["best_colocated"], cell["over_colocated"]) == (None, None)
    assert cell["verdict"] == "vllm_v1"


def test_two_cells_are_a_map_with_a_sentence():
    (said,) = report.sentences([MAP], [{(0, 0): NOBODY, (1, 0): CLEAR}])
    assert said.startswith(
        "No cell says not to disaggregate (of 2 cells, workload mine"
    )


def test_who_has_no_goodput_is_said():
    """In the table, where one of two systems serves nobody, or not by every seed."""
    one = (
        found("vllm_v0", 0.0, 0.0),
        found("orca", 0.0, 2.0),
        found(DISAGGREGATED, 3.0, 3.0),
    )
    table = report.text(SPEC, [MAP], [{(0, 0): one}])
    row = next(line for line in table.splitlines() if line.startswith("0.25 "))
    assert "some seeds have none: orca" in row
    two = (found("vllm_v0", 0.0, 0.0), found(DISAGGREGATED, 3.0, 3.0))
    table = report.text(SPEC, [MAP], [{(0, 0): two}])
    assert "only one serves: vllm_v0  only one serves: vllm_v0" in table


def test_a_goodput_however_small_is_one():
    small = (found("vllm_v0", 0.25, 0.25), found(DISAGGREGATED, 0.5, 0.5))
    table = report.text(SPEC, [MAP], [{(0, 0): small}])
    assert "vllm_v0's: 0.25/s; " in table and "no goodput" not in table


def test_candidates_are_listed_where_there_are_several():
    row = {
        **{"candidate": "2xcolocated:tp1", "devices": 2, "num_requests": 77},
        **{"seeds": [0, 1], "at_most": 3.0, "goodput": 2.5, "interval": [2.0, 3.0]},
        **{"steady": True, "bracketed": True, "resolved": True},
    }
    tried = tuple(dataclasses.replace(f, candidates=(row,)) for f in CLEAR)
    assert "2xcolocated:tp1" not in report.text(SPEC, [MAP], [{(0, 0): tried}])
    asked = dataclasses.replace(SPEC, budgets=(1,))
    lines = report.text(asked, [MAP], [{(0, 0): tried}]).splitlines()
    shown = [line.split() for line in lines if "2xcolocated:tp1" in line]
    assert shown == [["2xcolocated:tp1", "2", "2.5", "[2,", "3]", "77", "2"]] * 3


def test_a_cluster_without_a_link_is_said_to_have_a_free_one():
    free = dataclasses.replace(SPEC.simulation, inside=None)
    asked = dataclasses.replace(SPEC, simulation=free)
    assert "KV over a free link;" in report.text(asked, [MAP], [GRID])


def test_what_is_infinite_is_none_in_the_record():
    assert plain({"a": (float("inf"), 1.5)}) == {"a": [None, 1.5]}


def test_undecided_cells_are_said_with_the_range_of_their_ratio():
    """0.98 [0.88, 1.10] of three seeds, and by logs 0.022 +- 12.71 x 0.073: to 2.59.

    So 3 x (0.108 / 0.018)^2 seeds, and 2 x (0.931 / 0.022)^2.
    """
    wide = (found("vllm_v0", 1.0, 1.0), found(DISAGGREGATED, 1.1, 0.95))
    (said,) = report.sentences([MAP], [{(0, 0): CLOSE, (1, 0): wide, (2, 0): CLEAR}])
    first, second = said.splitlines()
    assert first.startswith("No decided cell says not to disaggregate (of 3 cells, ")
    assert second == (
        "Undecided: 2 of 3 cells: disaggregated over the best colocated system is "
        "0.40 to 2.59 there. After 3 seeds, about 109 would probably tell, but in 1 "
        "not even 1000."
    )


def test_seeds_that_would_tell_are_not_named_where_nobody_knows():
    one = (found("vllm_v0", 1.0), found(DISAGGREGATED, 2.0))
    assert report.more_seeds([judge(one)]) == ""
    none = (found("vllm_v0", 1.0, 0.0), found(DISAGGREGATED, 2.0, 1.0))
    (said,) = report.sentences([MAP], [{(0, 0): none, (1, 0): none}])
    assert said.endswith("Undecided: 2 of 2 cells: not every seed has a goodput there.")


def test_what_the_time_did_not_suffice_for_is_the_last_line():
    made = report.text(SPEC, [MAP], [GRID], left_out=["2 of 5 cells", "all layouts"])
    assert made.splitlines()[-1] == (
        "Left out, as the time of --minutes was spent: 2 of 5 cells; all layouts."
    )
    content = report.record(SPEC, [MAP], [GRID], left_out=["2 of 5 cells"])
    assert content["left_out"] == ["2 of 5 cells"] and content["served"] is None


@pytest.mark.parametrize(("rows", "said"), [(3 * 123, True), (4 * 123, False)])
def test_an_undecided_cell_says_that_its_trace_has_no_more_rows(rows, said):
    """Runs of 123 requests, by three seeds."""
    trace = TraceWorkload(rows=tuple(TraceRow(float(i), 9, 2) for i in range(rows)))
    each = slos_map([0.25], [0.04], trace, "mine")
    line = "it has rows for 3 seeds of 123 requests"
    assert (line in report.notes(each, {(0, 0): CLOSE})) == said
    assert line not in report.notes(each, {(0, 0): CLEAR})


def test_a_cell_does_not_repeat_the_rows_of_its_trace():
    rows = tuple(TraceRow(float(i), 10, 2) for i in range(1000))
    each = slos_map([0.25], [0.04], TraceWorkload(rows=rows), "mine")
    content = report.record(SPEC, [each], [{(0, 0): CLEAR}])
    (cell,) = content["maps"][0]["cells"]
    assert cell["cell"]["workload"]["rows"]["count"] == 1000
    assert len(str(content)) < 10_000
    assert "the trace's own rate: 1 requests/s" in content["maps"][0]["notes"]


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        (CLEAR, "disaggregated\n2/s\nd/c 2.00\n[2.00, 2.00]"),
        (CLOSE, "~ orca\n3/s\nd/c 0.98\n[0.88, 1.10]"),
        (NOBODY, "infeasible\nalone: 1.2 x\nthe targets"),
        ([found(f.system, 0.0, needs=0.9) for f in CLEAR], "infeasible\nunder load"),
        (
            [found("vllm_v0", 0.0, 0.0), found(DISAGGREGATED, 2.5, 2.5)],
            "disaggregated\n2.5/s\nonly kind that serves",
        ),
        (
            [found("vllm_v0", 2.0), found(DISAGGREGATED, 1.0)],
            "~ vllm_v0\n2/s\nd/c 0.50",
        ),
    ],
)
def test_a_cell_of_the_picture_says_who_and_by_how_much(cell, label):
    assert report._label(judge(cell)) == label


def drawn(monkeypatch, maps, grids):
    """The panels and the title of the picture."""
    said = []
    monkeypatch.setattr(
        report, "draw", lambda panels, title, *_, **__: said.append((panels, title))
    )
    report.plot(SPEC, maps, grids, pathlib.Path("x.png"))
    return said[0]


def test_the_picture_has_each_cell_at_its_place(monkeypatch):
    ((panel,), title) = drawn(monkeypatch, [MAP], [GRID])
    cells = panel.cells
    assert cells[0, 0].colour is None and cells[0, 0].text.startswith("infeasible")
    assert cells[1, 0].text.startswith("~ orca")
    assert cells[2, 0].text.startswith(DISAGGREGATED)
    assert [cells[x, 0].hatched for x in range(3)] == [False, True, False]
    assert cells[1, 0].colour == panel.legend["orca"]
    assert cells[2, 0].colour == panel.legend[DISAGGREGATED]
    assert (panel.columns, panel.rows) == (["0.25", "0.5", "1"], ["0.04"])
    assert (panel.x, panel.y) == ("TTFT target (s)", "TPOT target (s)")
    on = "opt-13b on 4 devices, fitted/distserve"
    assert title == f"Who serves the most: {on}, N=123, 3 seeds"
    longer = [dataclasses.replace(found("orca", 1.0, 1.0), num_requests=200), *CLEAR]
    (_, title) = drawn(monkeypatch, [MAP], [{**GRID, (2, 0): longer}])
    assert title.endswith(", N=123 to 200, 2 or 3 seeds")


def test_a_single_cell_is_a_bar_for_each_system(monkeypatch):
    one = slos_map([1.0], [0.04], WORKLOAD, "mine")
    ((panel,), title) = drawn(monkeypatch, [one], [{(0, 0): CLEAR}])
    ends = [span[:2] for bar in panel.bars for span in bar.spans]
    assert ends == [(0.0, pytest.approx(1.0)), (0.0, 0.5), (0.0, pytest.approx(2.0))]
    vllm_v0 = panel.bars[0]  # 1 +- 4.303 x 0.1 / sqrt(3)
    assert vllm_v0.interval == pytest.approx((0.7516, 1.2484), abs=1e-4)
    assert vllm_v0.label == "vllm_v0\nvllm_v0's"
    assert title.endswith(", N=123, 3 seeds; workload mine")
    assert panel.x.endswith("95 % intervals over seeds")
    assert panel.title == "TTFT <= 1 s, TPOT <= 0.04 s"


@dataclasses.dataclass(frozen=True)
class Rows:
    """As much of a trace's workload as its picture reads."""

    rows: list[TraceRow]


def test_the_lengths_of_a_trace_are_drawn_as_shares(monkeypatch, tmp_path):
    panels = []
    monkeypatch.setattr(report, "draw", lambda found, *_: panels.extend(found))
    rows = [TraceRow(float(i), 10 * i, i) for i in range(101)]
    report.plot_lengths(Rows(rows), tmp_path / "x.png")  # pyright: ignore
    prompts, outputs = panels[0].series
    assert (prompts.label, outputs.label) == ("prompts", "outputs")
    assert prompts.points[25] == (250.0, 25.0) and outputs.points[90] == (90.0, 90.0)
    assert panels[0].title == "101 requests"
