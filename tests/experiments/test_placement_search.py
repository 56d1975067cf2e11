"""The placement search from the command line, on searches of seconds."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from disagg_jax.deployment import Deployment, Parallelism
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.goodput import GoodputEstimate, Inversion
from disagg_jax.metrics.intervals import interval_across
from disagg_jax.progress import silent
from disagg_jax.scheduling import get_system
from disagg_jax.search import placement
from disagg_jax.search.candidates import (
    Candidate,
    CandidateResult,
    candidate_row,
)
from disagg_jax.search.goodput import SimGoodput
from disagg_jax.search.placement import (
    PlacementProblem,
    PlacementSearch,
    layouts_of,
    reasons_of,
)
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.engines import get_engine
from disagg_jax.work import StepLoad
from experiments.configs.named_simulations import placement_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.placement import report
from tests.commands import run_command

COARSE = SearchPlan(growth=1.5, tolerance=0.2, max_rates=20)


def search(model="opt-13b", devices=2, slo="0.25,0.1", **changes):
    problem = PlacementProblem.of(
        placement_simulation(model, "a100"),
        devices,
        workload=get_workload("fixed:512x64"),
        slo=SLO.parse(slo),
        plan=COARSE,
        num_requests=100,
        **changes,
    )
    return PlacementSearch(problem=problem, mapper=map, progress=silent)


def command(*arguments):
    return run_command("placement_search", *arguments)


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
    assert found["joint"]["winner"] == "vllm_v1 colocated:tp1"
    for algorithm in ("high", "low"):
        with pytest.raises(ValueError, match=f"{algorithm}: expected devices for"):
            search(devices=1).run([algorithm])


def test_a_rate_is_served_by_as_many_copies_as_it_takes():
    found = search(rate_rps=40.0).run(["high", "low"])
    assert found["high"]["goodput_rps"] >= 40 and found["low"]["goodput_rps"] >= 40
    fewer = found["low"]["copies"] - 1
    one = found["low"]["goodput_rps"] / found["low"]["copies"]
    assert fewer * one < 40
    assert f"low: {found['low']['copies']} x" in report.report(found)


def test_the_answer_of_high_as_a_whole():
    asked = dataclasses.replace(search(devices=3), whole=True)
    found = asked.run(["high"])["high"]
    (whole,) = found["as a whole"]
    assert Deployment.parse(whole["candidate"]) == Deployment.parse(found["winner"])
    # Together they serve about what Algorithm 1 says: the search's 20 % each.
    assert whole["goodput"] == pytest.approx(found["goodput_per_device_rps"], rel=0.4)


# -- tables and answers, of goodputs that are told -------------------------------------


def outcome(
    name="prefill:tp1",
    per_seed=(6.0, 8.0),
    devices=2,
    scale=0.5,
    *,
    had_to_beat=False,
    **found,
):
    """A candidate's; without a goodput by seed it is below its bound."""
    candidate = Candidate(
        name=name,
        search=SimpleNamespace(num_requests=77, seeds=(3, 4)),
        devices=devices,
        bound_rps=10.0,
    )
    if per_seed is None:
        return CandidateResult(candidate=candidate, goodput=None)
    estimate = GoodputEstimate(
        per_seed_rps=per_seed,
        interval=interval_across(per_seed),
        **{"pass_rps": 6.0, "fail_rps": 9.0, "bracketed": True, "resolved": True}
        | found,
    )
    goodput = SimGoodput(
        found=estimate,
        steady=False,
        num_requests=77,
        seeds=(3, 4),
        runs=5,
        unloaded_scale=scale,
    )
    return CandidateResult(
        candidate=candidate, goodput=goodput, had_to_beat=had_to_beat
    )


def test_a_row_has_goodputs_per_device():
    """7 +- 12.706 requests/s of two devices, from 0 on."""
    row = candidate_row(outcome(resolved=False))
    assert (row["goodput"], row["at_most"]) == (3.5, 4.5)
    low, high = row["interval"]
    interval = interval_across((6.0, 8.0))
    assert (low, high) == (interval.low / 2, interval.high / 2)
    assert (row["resolved"], row["bracketed"], row["steady"]) == (False, True, False)
    assert (row["num_requests"], row["seeds"], row["devices"]) == (77, [3, 4], 2)
    assert candidate_row(outcome(per_seed=(7.0,)))["interval"] == [None, None]


@pytest.mark.parametrize(
    ("found", "why", "at_most"),
    [
        (outcome(per_seed=None), "bound", 5.0),
        (outcome(pass_rps=None, had_to_beat=True), "beaten", 4.5),
        (outcome(pass_rps=None, had_to_beat=True, scale=1.0), "beaten", 4.5),
        (outcome(pass_rps=None), "fails at every rate that was tried", 4.5),
        (
            outcome(pass_rps=None, scale=1.5),
            "alone it needs 1.5 x the targets",
            4.5,
        ),
    ],
)
def test_a_row_without_a_goodput_says_why_and_the_bound_per_device(found, why, at_most):
    row = candidate_row(found)
    assert (row["goodput"], row["why"], row["at_most"]) == (None, why, at_most)
    (line,) = report.lines([row])[1:]
    assert f"<= {at_most:g} ({why})" in line and line.endswith(" 77 2")


def test_a_line_has_the_interval_and_what_is_doubtful():
    rises = Inversion(fail_rps=2.0, fail_score=0.5, pass_rps=4.0, pass_score=1.0)
    rows = [
        candidate_row(found)
        for found in (
            outcome(per_seed=(7.0, 7.0), bracketed=False),
            outcome(per_seed=(7.0,), resolved=False, inversion=rises),
        )
    ]
    rows[1]["steady"] = True
    first, second = (line.split(maxsplit=2)[2] for line in report.lines(rows)[1:])
    assert first.split() == [
        *("3.5", "[3.5,", "3.5]", "77", "2", "not", "bracketed,", "not", "steady"),
    ]
    assert second.startswith("3.5 ") and "[" not in second
    assert second.endswith(f"77 2  not resolved, {rises.text(2)}")
    assert " 50.0% at 1 requests/s per device" in rises.text(2)


@pytest.mark.parametrize(("number", "more"), [(11, 0), (12, 0), (13, 1), (20, 8)])
def test_a_dozen_rows_are_shown_and_the_others_counted(number, more):
    rows = [candidate_row(outcome(name=f"no{i}")) for i in range(number)]
    shown = report.lines(rows)[1:]
    last = [f"  ... and {more} more"] if more else []
    assert shown[12:] == last
    assert [line.split()[0] for line in shown[:12]] == [
        f"no{i}" for i in range(min(number, 12))
    ]


def test_long_names_leave_the_columns_straight():
    names = ("disaggregated_chunked prefill:tp1pp2,decode:tp2pp2", "orca colocated:tp1")
    rows = [candidate_row(outcome(name=name)) for name in names]
    head, *shown = report.lines(rows)
    assert {line.index("3.5 [") for line in shown} == {head.index("requests/s")}
    assert shown[0].split()[2] == "2"  # the devices, apart from the name


# Requests/s of each phase alone, of the candidates that are told.
PHASES = {
    **{"prefill:tp1": 5.0, "prefill:tp2": 8.0, "prefill:tp1pp2": 1.0},
    **{"decode:tp1": 3.0, "decode:tp2": 8.0, "decode:tp1pp2": 1.0},
}


def told(monkeypatch, rates, scale=0.5):
    """Searches find these goodputs, by name; others 3 for a unit. Returns the calls."""
    calls = []

    def best_first(candidates, mapper, progress, *, part, prune, stop):
        del mapper, progress
        calls.append(prune)
        found = []
        for one in candidates:
            rps = rates.get(one.name, 3.0)
            passing = {} if rps else {"pass_rps": None}
            goodput = outcome(per_seed=(rps,) * 2, scale=scale, **passing).goodput
            found.append(CandidateResult(candidate=one, goodput=goodput))
        return sorted(found, key=lambda each: -each.per_device_rps)

    monkeypatch.setattr(placement, "best_first", best_first)
    return calls


def test_high_replicates_the_best_layout_of_each_phase(monkeypatch):
    """2 x 5 and 8 requests/s on 2 + 2 of four devices."""
    told(monkeypatch, PHASES)
    found = search(devices=4).run(["high"])["high"]
    assert found["deployment"] == found["winner"] == "2xprefill:tp1,1xdecode:tp2"
    assert (found["goodput_rps"], found["devices"]) == (8.0, 4)
    assert found["goodput_per_device_rps"] == 2.0
    assert [row["candidate"] for row in found["prefill"]][:2] == [
        *("prefill:tp1", "prefill:tp2"),
    ]
    assert found["as a whole"] == []
    shown = report.report({"checked": "", "skipped": {}, "high": found})
    assert shown.splitlines()[-1] == (
        "high: 2xprefill:tp1,1xdecode:tp2 on 4 devices: 8 requests/s, 2 per device"
    )


def test_high_takes_as_many_replicas_as_a_rate_needs(monkeypatch):
    """4 x 5 and 3 x 8 serve 20 requests/s, on 4 + 6 devices."""
    told(monkeypatch, PHASES)
    found = search(devices=4, rate_rps=20.0).run(["high"])["high"]
    assert found["deployment"] == "4xprefill:tp1,3xdecode:tp2"
    assert (found["goodput_rps"], found["devices"]) == (20.0, 10)
    assert found["goodput_per_device_rps"] == 2.0


def test_where_the_best_of_both_do_not_fit_the_slower_phase_decides(monkeypatch):
    """On three devices two of tp2 do not: of the others, min(5, 4) is the best."""
    rates = {**PHASES, "prefill:tp2": 12.0}
    told(monkeypatch, rates)
    found = search(devices=3).run(["high"])["high"]
    assert found["deployment"] == "1xprefill:tp1,1xdecode:tp2"
    told(monkeypatch, {**rates, "decode:tp2": 6.2, "decode:tp1": 3.0})
    # 6 and 3 per device against 5 and 3.1.
    found = search(devices=3).run(["high"])["high"]
    assert found["deployment"] == "1xprefill:tp1,1xdecode:tp2"


@pytest.mark.parametrize(
    ("rate_rps", "copies"), [(None, 2), (3.0, 1), (3.1, 2), (10.0, 4)]
)
def test_low_copies_its_unit_as_often_as_fits_or_as_a_rate_needs(
    monkeypatch, rate_rps, copies
):
    """A unit serves 3 requests/s; the one of two devices serves the most on each."""
    told(monkeypatch, PHASES)
    found = search(devices=4, rate_rps=rate_rps).run(["low"])["low"]
    assert found["winner"] == "prefill:tp1,decode:tp1"
    assert (found["copies"], found["devices"]) == (copies, 2 * copies)
    assert found["goodput_rps"] == pytest.approx(3.0 * copies)
    deployment = Deployment.parse(found["deployment"])
    assert deployment.devices == 2 * copies
    assert found["system"] == "disaggregated"
    line = report.report({"checked": "", "skipped": {}, "low": found}).splitlines()[-1]
    start = f"low: {copies} x prefill:tp1,decode:tp1 on {2 * copies} devices: "
    assert line.startswith(start)


def test_joint_searches_phases_in_full_and_names_a_colocated_winner(monkeypatch):
    calls = told(monkeypatch, {"orca colocated:tp1": 9.0})
    found = search(devices=2).run(["joint"])["joint"]
    assert calls == [False, False, True]  # both phases, then the units
    assert (found["winner"], found["system"]) == ("orca colocated:tp1", "orca")
    assert found["goodput_rps"] == 9.0 * found["copies"]
    calls.clear()
    search(devices=2).run(["low"])
    assert calls == [True, True, True]
    calls.clear()
    dataclasses.replace(search(devices=2), prune=False).run(["low"])
    assert calls == [False, False, False]


# -- copies and one deployment, systems, devices by role ------------------------------


def test_copies_are_held_against_one_deployment_with_all_their_instances(monkeypatch):
    """2 + 2 serve 9 requests/s, and two copies of 1 + 1 serve 2 x 3."""
    told(monkeypatch, {"2xprefill:tp1,2xdecode:tp1": 9.0})
    asked = dataclasses.replace(search(devices=4, seeds=(3, 4)), whole=True)
    found = asked.run(["low"])["low"]
    assert found["copies"] == 2
    one = found["as_one"]
    assert one["candidate"] == "2xprefill:tp1,2xdecode:tp1"
    assert (one["goodput"], one["over_copies"]["mean"]) == (9 / 4, pytest.approx(1.5))
    line = report.report({"checked": "", "skipped": {}, "low": found}).splitlines()[-1]
    assert line.endswith(
        "as one deployment, KV between any two instances: 2xprefill:tp1,2xdecode:tp1: "
        "2.25 [2.25, 2.25] requests/s per device, 1.50 [1.50, 1.50] x that of 2 copies"
    )
    alone = dataclasses.replace(search(devices=2, seeds=(3, 4)), whole=True)
    assert alone.run(["low"])["low"]["as_one"] is None


def test_one_deployment_shares_its_queues():
    """Simulated: of two pairs whose arrivals are split, one waits while another idles.

    Both sides have 2 prefill and 2 decode instances, and the same seeds.
    """
    asked = dataclasses.replace(search(devices=4, seeds=(0, 1)), whole=True)
    problem = dataclasses.replace(asked.problem, layouts=(Parallelism(1),))
    found = dataclasses.replace(asked, problem=problem).run(["low"])["low"]
    assert found["copies"] == 2 and found["as_one"]["over_copies"]["mean"] > 1


def test_a_colocated_system_alone_is_placed_by_joint_only(monkeypatch):
    told(monkeypatch, {"orca colocated:tp2": 9.0})
    given = PlacementProblem.of(
        placement_simulation("opt-13b", "a100"),
        2,
        {"orca": get_system("orca")},
        workload=get_workload("fixed:512x64"),
        slo=SLO.parse("0.25,0.1"),
    )
    asked = PlacementSearch(problem=given, mapper=map, progress=silent)
    found = asked.run(["joint"])["joint"]
    assert (found["winner"], found["system"]) == ("orca colocated:tp2", "orca")
    with pytest.raises(ValueError, match="algorithms: expected joint, as none of .'or"):
        asked.run(["low"])


def searched(names, devices=2):
    """A search of these systems."""
    return search(devices=devices, systems={name: get_system(name) for name in names})


def test_of_two_colocated_systems_the_better_one_is_named(monkeypatch):
    told(monkeypatch, {"orca colocated:tp2": 9.0, "vllm_v1 colocated:tp2": 9.5})
    asked = searched(["orca", "vllm_v1"])
    assert not asked.problem.apart  # nothing is built that was not asked for
    found = asked.run(["joint"])["joint"]
    assert (found["winner"], found["system"]) == ("vllm_v1 colocated:tp2", "vllm_v1")
    systems = {row["candidate"].split()[0] for row in found["candidates"]}
    assert systems == {"orca", "vllm_v1"}


def test_two_disaggregated_systems_are_searched_with_phases_of_their_own(monkeypatch):
    """The best phases are not of one system: each pairs its own two."""
    one, other = "disaggregated", "disaggregated_chunked"
    rates = {
        **{f"{one} {name}": rps for name, rps in PHASES.items()},
        **{f"{other} {name}": 0.9 * rps for name, rps in PHASES.items()},
        **{f"{one} decode:tp1": 0.1, f"{one} decode:tp2": 0.1},
    }
    calls = told(monkeypatch, rates)
    found = searched([one, other], devices=4).run(["high"])["high"]
    assert len(calls) == 4  # two phases of each
    deployment = "2xprefill:tp1,1xdecode:tp2"
    assert (found["system"], found["deployment"]) == (other, deployment)
    assert found["winner"] == f"{other} {deployment}"
    assert found["goodput_rps"] == pytest.approx(0.9 * 8)
    # Both are in the tables, the best first.
    names = [row["candidate"].split()[0] for row in found["prefill"]]
    assert (names[0], set(names)) == (one, {one, other})


@pytest.mark.parametrize("algorithm", ["low", "joint"])
def test_two_disaggregated_systems_share_a_table_of_units(monkeypatch, algorithm):
    best = "disaggregated_chunked prefill:tp1,decode:tp1"
    told(monkeypatch, {best: 7.0})
    asked = searched(["disaggregated", "disaggregated_chunked", "orca"])
    built = []

    def noted(system, build):
        return lambda deployment: built.append(system) or build(deployment)

    apart = {name: noted(name, build) for name, build in asked.problem.apart.items()}
    problem = dataclasses.replace(asked.problem, apart=apart)
    found = dataclasses.replace(asked, problem=problem).run([algorithm])[algorithm]
    assert (found["winner"], found["system"]) == (best, best.split()[0])
    assert found["deployment"] == "prefill:tp1,decode:tp1"
    systems = {row["candidate"].split()[0] for row in found["candidates"]}
    colocated = {"orca"} if algorithm == "joint" else set()
    assert systems == {"disaggregated", "disaggregated_chunked"} | colocated
    assert set(built) == {"disaggregated", "disaggregated_chunked"}


def test_no_system_at_all_is_refused():
    with pytest.raises(ValueError, match="systems: expected at least one, got "):
        searched([])


def test_the_command_takes_two_colocated_systems(tmp_path):
    done = command(
        *("--model=opt-13b", "--hardware=a100", "--devices=2", "--slo=0.25,0.1"),
        *("--workload=fixed:512x64", "--num_requests=40", "--workers=1"),
        *("--tolerance=0.3", "--systems=orca,vllm_v1", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "placement.json").read_text())
    assert "high" not in found and found["joint"]["system"] in ("orca", "vllm_v1")
    systems = {row["candidate"].split()[0] for row in found["joint"]["candidates"]}
    assert systems == {"orca", "vllm_v1"}


def test_the_time_that_is_spent_leaves_candidates_out():
    """Each search begins with two; a phase that was not searched has no pairs."""
    asked = dataclasses.replace(search(devices=3), stop=lambda: True)
    found = asked.run(["low"])
    assert found["left_out"] > 0
    assert found["low"]["left_out"] + len(found["low"]["candidates"]) > 0
    said = report.report(found)
    many = f"{found['left_out']} layouts of a phase alone"
    assert f"left out, as the time of --minutes was spent: {many}" in said


def test_each_role_has_the_devices_that_are_given():
    """Prompts take less time on an h100, and its KV memory is that of its devices."""
    mixed = placement_simulation("llama-3-8b", "prefill=h100,decode=a100")
    assert (mixed.prefill_cost.name, mixed.cost.name) == (
        "roofline/h100",
        "roofline/a100-80g",
    )
    assert mixed.inside == "200gb"
    linked = placement_simulation(
        "llama-3-8b", "prefill=h100,decode=a100", link="400gb"
    )
    assert linked.inside == "400gb"
    prompt = StepLoad(((0, 1000),), 0, 0)
    built = mixed.build("prefill:tp1,decode:tp1")
    seconds = [sum(built.cost.stages_s(i, prompt)) for i in (0, 1)]
    assert seconds[0] < 0.6 * seconds[1]
    small = dataclasses.replace(
        mixed.prefill_cost, kv_tokens=lambda at: 160 * at.devices
    )
    less = dataclasses.replace(mixed, prefill_cost=small)
    blocks = [pool.num_blocks for pool in less.build("prefill:tp2,decode:tp1").memory]
    assert blocks == [20, mixed.build("prefill:tp1,decode:tp1").memory[1].num_blocks]
    same = placement_simulation("opt-13b", "prefill=a100,decode=a100-80g")
    assert same.prefill_cost is None and same.cost.name == "fitted/distserve"


@pytest.mark.parametrize(
    "text", ["prefill=h100", "h100,a100", "prefill=h100,decode=", "a=h100,b=a100", ""]
)
def test_bad_devices_by_role(text):
    with pytest.raises(ValueError, match="hardware: expected one device, or prefill="):
        placement_simulation("opt-13b", text)


def test_the_command_places_one_system_by_a_trace_on_devices_by_role(tmp_path):
    rows = [f"{i},{100 + i},{4 + i % 3}" for i in range(150)]
    head = "arrival_s,prompt_tokens,output_tokens"
    (tmp_path / "trace.csv").write_text("\n".join([head, *rows]) + "\n")
    done = command(
        *("--model=opt-13b", "--hardware=prefill=h100,decode=a100", "--devices=2"),
        *("--slo=0.5,0.1", f"--trace={tmp_path}/trace.csv", "--system=disaggregated"),
        *("--num_requests=40", "--workers=1", "--tolerance=0.3", "--algorithm=low"),
        f"--out={tmp_path}/out",
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == (
        "opt-13b: prefill roofline/h100, decode roofline/a100-80g, KV over 200gb"
    )
    assert "the trace's own rate: 1 requests/s" in lines
    found = json.loads((tmp_path / "out" / "placement.json").read_text())
    assert found["low"]["system"] == "disaggregated"
    assert found["low"]["winner"] == "prefill:tp1,decode:tp1"


def test_colocated_systems_have_no_place_on_devices_by_role():
    done = command(
        *("--model=opt-13b", "--hardware=prefill=h100,decode=a100", "--devices=2"),
        *("--slo=0.5,0.1", "--systems=disaggregated,orca", "--workers=1"),
    )
    assert done.returncode == 1
    assert "error: systems: expected no colocated one on --hardware=" in done.stderr
    done = command(
        *("--model=opt-13b", "--hardware=prefill=h100,decode=a100", "--devices=2"),
        *("--slo=0.5,0.1", "--system=orca", "--workers=1"),
    )
    assert "error: systems: expected no colocated one on --hardware=" in done.stderr


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((3.0, 2.0), "the fastest, b, needs 2 times as much for requests that are ser"),
        ((3.0, 0.75), "can meet under load; the fastest, b, meets them only for requ"),
        ((1.0, 3.0), "can meet under load; the fastest, a, meets them only for reque"),
    ],
)
def test_targets_that_nobody_meets_name_the_fastest(scales, message):
    none = [
        outcome(name=name, pass_rps=None, scale=scale)
        for name, scale in zip("ab", scales, strict=True)
    ]
    with pytest.raises(ValueError) as error:
        placement._require_reachable([*none, outcome(per_seed=None)], "decode alone")
    assert message in str(error.value) and "that decode alone can" in str(error.value)
    placement._require_reachable([outcome(), *none], "decode alone")


def test_a_cost_model_that_was_fitted_for_one_device_is_for_no_other():
    assert placement_simulation("opt-13b", "a100-80g").cost.name == "fitted/distserve"
    assert placement_simulation("opt-13b", "h100").cost.name == "roofline/h100"


def test_one_cost_model_for_all_systems():
    assert placement_simulation("opt-66b", "a100").cost.name == "fitted/distserve"
    assert placement_simulation("opt-175b", "a100").cost.name == "roofline/a100-80g"
    assert placement_simulation("opt-66b", "h100").cost.name == "roofline/h100"


def test_layouts_divide_the_layers():
    assert layouts_of(40, 3, 8) == (
        *(Parallelism(1, 1), Parallelism(1, 2)),
        *(Parallelism(2, 1), Parallelism(3, 1)),
    )
    assert max(layout.tp for layout in layouts_of(64, 32, 8)) == 8
    # Inside a node of two devices; 40 layers on three stages are not cut.
    assert layouts_of(40, 4, 2) == (
        *(
            Parallelism(1, 1),
            Parallelism(1, 2),
            Parallelism(1, 4),
            Parallelism(2, 1),
            Parallelism(2, 2),
        ),
    )


def test_reasons_are_told_once():
    skipped = {"tp1pp1": "expected 2, got 1", "tp1pp2": "expected 2, got 3"}
    assert reasons_of(skipped) == ["tp1pp1 tp1pp2: expected 2"]


def test_slo_is_two_numbers():
    assert SLO.parse("2.5,0.15") == SLO(ttft_s=2.5, tpot_s=0.15)
    for text in ("2.5", "2.5,a", "1,2,3"):
        with pytest.raises(ValueError, match="slo: expected TTFT_S,TPOT_S"):
            SLO.parse(text)


def test_all_devices_have_the_overheads_of_the_engine():
    unlike = "prefill=h100,decode=a100-80g"
    simulation = placement_simulation("opt-13b", unlike, engine="vllm")
    assert simulation.cost.name == "roofline/a100-80g/vllm"
    assert simulation.prefill_cost.name == "roofline/h100/vllm"
    # DistServe's coefficients are those of another engine.
    assert placement_simulation("opt-13b", "a100").cost.name == "fitted/distserve"
    found = placement_simulation("opt-13b", "a100", engine="vllm")
    assert found.cost.name == "roofline/a100-80g/vllm"
    with pytest.raises(ValueError, match="engine: expected the cost model roofline"):
        placement_simulation("opt-13b", "a100", "fitted/vllm", engine="vllm")


def test_the_command_places_systems_with_the_limits_of_an_engine(tmp_path):
    done = command(
        *("--model=llama-3-8b", "--hardware=h100", "--devices=1", "--slo=0.5,0.05"),
        *("--workload=fixed:512x64", "--num_requests=30", "--workers=1"),
        *("--systems=vllm_v0", "--engine=vllm", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    said = get_engine("vllm").checked("llama-3-8b", "h100", "bf16")
    assert done.stdout.count(said) == done.stdout.count("engine ") == 1
    assert json.loads((tmp_path / "placement.json").read_text())["checked"] == said
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["engine"]["name"] == "vllm"
