"""`experiments.simulator_speed`: what a line says, and that it is checked."""

import dataclasses
import json

import pytest

from experiments import simulator_speed
from experiments.simulator_speed import (
    GOLDEN_RUNS,
    fleets,
    measure,
    pool_tasks,
    report,
    report_pools,
    workloads,
)


@pytest.fixture(scope="module")
def found(shared_dir):
    return list(workloads(shared_dir / "golden" / "simdistserve"))


def test_a_line_for_each_golden_workload_and_saturated_ones(found):
    names = [workload.name for workload in found]
    assert names[: len(GOLDEN_RUNS)] == list(GOLDEN_RUNS)
    assert all(name.startswith("saturated") for name in names[len(GOLDEN_RUNS) :])
    assert len(names) > len(GOLDEN_RUNS)


def test_a_line_says_what_was_done_and_how_fast(found):
    line = measure(found[0], repeats=1)
    assert (line["requests"], line["tokens"]) == (1000, 65_000)  # 64 + 1 of each
    assert line["requests_per_cpu_s"] == pytest.approx(1000 / line["cpu_s"])
    assert line["worst_difference_ms"] < 1e-6


def test_another_result_is_an_error(found, capsys):
    other = dataclasses.replace(
        found[0],
        requests=[
            dataclasses.replace(r, prompt_tokens=r.prompt_tokens + 1)
            for r in found[0].requests
        ],
    )
    with pytest.raises(SystemExit, match="is not simdistserve's result"):
        report([other], repeats=1)
    assert "requests_per_cpu_s" in capsys.readouterr().out


def test_missing_files_are_named_and_left_out(tmp_path, capsys):
    names = [workload.name for workload in workloads(tmp_path)]
    assert names and all(name.startswith("saturated") for name in names)
    assert str(tmp_path / f"{next(iter(GOLDEN_RUNS))}.csv") in capsys.readouterr().err


def test_fleets_of_two_systems_of_each_size(capsys):
    few = (
        dataclasses.replace(fleet, requests=fleet.requests[:200])
        for fleet in fleets([2, 5])
    )
    report(few, repeats=1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["instances"], line["deployment"]) for line in lines] == [
        (2, "prefill:tp1,decode:tp1"),
        (2, "2xcolocated:tp1"),
        (5, "2xprefill:tp1,3xdecode:tp1"),
        (5, "5xcolocated:tp1"),
    ]
    for line in lines:
        assert line["requests"] == 200
        assert line["requests_per_cpu_s"] == pytest.approx(200 / line["cpu_s"])


def test_large_fleets_have_20_requests_an_instance():
    sizes = [len(fleet.requests) for fleet in fleets([5, 150])]
    assert sizes == [2000, 2000, 3000, 3000]


def test_a_fleet_has_two_instances_at_least():
    with pytest.raises(ValueError, match="instances: expected at least 2, got 1"):
        next(fleets([4, 1]))


def test_a_line_for_each_kind_of_workers(capsys):
    report_pools([1, 2], pool_tasks(num_requests=20))
    one, two = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["results"] == two["results"]
    assert one["runs"] == 16 and min(two[k] for k in ("start_s", "task_ms")) > 0


def test_other_results_of_other_workers_are_an_error(monkeypatch, capsys):
    lines = iter([{"results": "a"}, {"results": "b"}])
    monkeypatch.setattr(simulator_speed, "pool_line", lambda *_: next(lines))
    with pytest.raises(SystemExit, match="gave different results"):
        report_pools([1, 2], [])
    assert len(capsys.readouterr().out.splitlines()) == 2
