"""The tables and labels of a comparison from cells made by hand."""

import dataclasses

import matplotlib.figure
import pytest

from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.run import SimWorkload
from disagg_jax.workload.lengths import FixedLengths
from disagg_jax.workload.traces import TraceRow
from experiments.comparison import report
from experiments.comparison.comparison import (
    DISAGGREGATED,
    Found,
    Question,
    judge,
    slos_map,
)
from experiments.configs.named_simulations import get_simulation
from experiments.runs.folder import plain

WORKLOAD = SimWorkload(prompt=FixedLengths(tokens=9), output=FixedLengths(tokens=3))


def found(system, *per_seed_rps, needs=0.5, **best):
    return Found(
        system=system,
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
QUESTION = Question(
    simulation=get_simulation("opt13b_a100"),
    devices=4,
    systems=("vllm_v0", "orca", DISAGGREGATED),
    sizes=(128,),
    plan=SearchPlan(target=0.8),
    seeds=(0, 1, 2),
)
MAP = slos_map([0.25, 0.5, 1.0], [0.04], WORKLOAD, "mine")
GRID = {(0, 0): NOBODY, (1, 0): CLOSE, (2, 0): CLEAR}
TEXT = report.text(QUESTION, [MAP], [GRID])


def rows(title):
    table = TEXT.split(f"{title}\n")[1].split("\n\n")[0]
    return [line.split() for line in table.splitlines()]


def test_a_cell_has_its_winner_its_goodput_and_both_ratios():
    nobody, close, clear = rows("map of targets: workload mine")[1:]
    assert nobody == [
        *("0.25", "0.04", "123", "-", "-", "-", "-", "infeasible:", "even", "alone"),
        *("orca", "needs", "1.25", "x", "the", "targets"),
    ]
    assert close == [
        *("0.5", "0.04", "123", "orca", "3", "[2.75,", "3.25]"),
        *("1.02", "[0.91,", "1.14]", "(unclear)", DISAGGREGATED),
        *("0.98", "[0.88,", "1.10]", "(unclear)", "orca", "no", "clear", "winner"),
    ]
    assert clear == [
        *("1", "0.04", "123", DISAGGREGATED, "2", "[1.5,", "2.5]"),
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


def test_the_head_says_what_was_asked():
    for said in (
        "opt-13b on 4 devices, fitted/distserve, KV over nvlink-a100; simulated",
        "requests/s per device at which 80% of the requests meet both targets",
        "seeds 0, 1, 2; N requests a run",
        "at once, at most: vllm_v0 256, orca 128, disaggregated 256;",
    ):
        assert said in TEXT.split("\n\n")[0]


def test_the_record_has_the_numbers_of_the_table():
    content = report.record(QUESTION, [MAP], [GRID])
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
    assert (asked["devices"], asked["seeds"], asked["sizes"]) == (4, (0, 1, 2), (128,))
    assert asked["plan"]["target"] == 0.8
    assert made["sentence"] == report.sentences([MAP], [GRID])[0]


def test_what_is_infinite_is_none_in_the_record():
    assert plain({"a": (float("inf"), 1.5)}) == {"a": [None, 1.5]}


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


def test_the_picture_has_each_cell_at_its_place():
    axes = matplotlib.figure.Figure().subplots()
    report._draw(axes, MAP, GRID)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[1, 0].startswith("~ orca") and texts[2, 0].startswith(DISAGGREGATED)
    hatched = [patch.get_hatch() for patch in axes.patches]
    assert hatched == [None, "///", None]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0.25",
        "0.5",
        "1",
    ]
    assert axes.get_xlabel() == "TTFT target (s)"
    assert axes.get_ylabel() == "TPOT target (s)"


def test_a_single_cell_is_a_bar_for_each_system(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self)
    )
    one = slos_map([1.0], [0.04], WORKLOAD, "mine")
    report.plot(QUESTION, [one], [{(0, 0): CLEAR}], tmp_path / "x.png")
    (axes,) = drawn[0].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([1.0, 0.5, 2.0])
    ends = list(axes.lines[0].get_xdata())  # 1 +- 4.303 x 0.1 / sqrt(3)
    assert ends == pytest.approx([0.7516, 1.2484], abs=1e-4)
    assert axes.get_title().endswith("workload mine\nTTFT <= 1 s, TPOT <= 0.04 s")


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
