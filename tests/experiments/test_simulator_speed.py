"""`experiments.simulator_speed`: what a line says, and that it is checked."""

import dataclasses

import pytest

from disagg_jax.compiled import compiled_modules
from experiments.simulator_speed import GOLDEN_RUNS, measure, report, workloads


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
    assert line["compiled"] == bool(compiled_modules())


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
