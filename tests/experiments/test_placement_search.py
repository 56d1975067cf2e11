"""The placement search from the command line, on searches of seconds."""

import dataclasses
import json
import subprocess
import sys

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import SLO
from disagg_jax.search.placement import Layout
from disagg_jax.search.rates import SearchPlan
from experiments.configs.paper_workloads import get_workload
from experiments.placement.placements import (
    Search,
    layouts_of,
    parse_slo,
    problem_of,
    reasons_of,
    report,
    simulation_of,
)

COARSE = SearchPlan(growth=1.5, tolerance=0.2, max_rates=20)


def search(model="opt-13b", devices=2, slo="0.25,0.1", **changes):
    problem = problem_of(
        simulation_of(model, "a100"),
        devices,
        workload=get_workload("fixed:512x64"),
        slo=parse_slo(slo),
        plan=COARSE,
        num_requests=100,
        **changes,
    )
    return Search(problem=problem, mapper=map, progress=lambda text: None)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.placement_search", *arguments],
        capture_output=True,
        text=True,
    )


def test_the_command_writes_tables_and_winners(tmp_path):
    done = command(
        *("--model=opt-13b", "--hardware=a100", "--devices=3", "--slo=0.25,0.1"),
        *("--workload=fixed:512x64", "--num_requests=60", "--seeds=2", "--workers=1"),
        *("--tolerance=0.2", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert "high:" in done.stdout and "s with 1 workers" in done.stdout
    assert "best" in done.stderr  # progress
    found = json.loads((tmp_path / "placement.json").read_text())
    assert found["workers"] == 1 and found["wall_s"] > 0
    assert found["flags"]["slo"] == "0.25,0.1"
    for algorithm in ("high", "low"):
        answer = found[algorithm]
        assert answer["system"] == "disaggregated"
        assert Deployment.parse(answer["deployment"]).devices == answer["devices"]
    assert found["high"]["devices"] <= 3
    (best, *_) = found["low"]["candidates"]
    assert best["candidate"] == found["low"]["winner"]
    assert (best["num_requests"], best["seeds"]) == (60, [0, 1])
    assert best["interval"][0] <= best["goodput"] <= best["interval"][1]
    assert {"resolved", "steady", "bracketed"} <= set(best)
    # Two devices make a pair; the third is left over, and counts.
    assert found["low"]["goodput_rps"] == pytest.approx(best["goodput"] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=opt-66b", "--devices=1"],
            "layouts: expected at least one that fits",
        ),
        (["--model=opt-13b", "--devices=0"], "devices: expected >= 1"),
    ],
)
def test_bad_questions_are_one_line(arguments, message):
    done = command(*arguments, "--slo=0.2,0.1", "--workers=1")
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_targets_below_the_unloaded_latency_say_by_how_much():
    expected = "prefill:tp1, needs [0-9.]+ times as much .* served alone"
    with pytest.raises(ValueError, match=expected):
        search(slo="0.01,0.1").run(["high"])
    with pytest.raises(ValueError, match="decode:tp1, needs [0-9.]+ times as much"):
        search(slo="0.25,0.005").run(["low"])


def test_one_device_has_only_colocated_systems():
    found = search(devices=1).run(["joint"])
    assert found["joint"]["winner"] == "vllm_v0 colocated:tp1"
    for algorithm in ("high", "low"):
        with pytest.raises(ValueError, match=f"{algorithm}: expected devices for"):
            search(devices=1).run([algorithm])


def test_a_rate_is_served_by_as_many_copies_as_it_takes():
    found = search(rate_rps=40.0).run(["high", "low"])
    assert found["high"]["goodput_rps"] >= 40 and found["low"]["goodput_rps"] >= 40
    fewer = found["low"]["copies"] - 1
    one = found["low"]["goodput_rps"] / found["low"]["copies"]
    assert fewer * one < 40
    assert f"low: {found['low']['copies']} x" in report(found)


def test_the_answer_of_high_as_a_whole():
    asked = dataclasses.replace(search(devices=3), whole=True)
    found = asked.run(["high"])["high"]
    (whole,) = found["as a whole"]
    assert Deployment.parse(whole["candidate"]) == Deployment.parse(found["winner"])
    # Together they serve about what Algorithm 1 says: the search's 20 % each.
    assert whole["goodput"] == pytest.approx(found["goodput_per_device_rps"], rel=0.4)


def test_one_cost_model_for_all_systems():
    assert simulation_of("opt-66b", "a100").costs == ("fitted/distserve",)
    assert simulation_of("opt-175b", "a100").costs == ("roofline/a100-80g",)
    assert simulation_of("opt-66b", "h100").costs == ("roofline/h100",)


def test_layouts_divide_the_layers():
    assert layouts_of("opt-13b", 3, 8) == (
        *(Layout(1, 1), Layout(1, 2)),  # of 40 layers
        *(Layout(2, 1), Layout(3, 1)),
    )
    assert max(layout.tp for layout in layouts_of("opt-66b", 32, 8)) == 8


def test_reasons_are_told_once():
    skipped = {"tp1pp1": "expected 2, got 1", "tp1pp2": "expected 2, got 3"}
    assert reasons_of(skipped) == ["tp1pp1 tp1pp2: expected 2"]


def test_slo_is_two_numbers():
    assert parse_slo("2.5,0.15") == SLO(ttft_s=2.5, tpot_s=0.15)
    for text in ("2.5", "2.5,a", "1,2,3"):
        with pytest.raises(ValueError, match="slo: expected TTFT_S,TPOT_S"):
            parse_slo(text)
