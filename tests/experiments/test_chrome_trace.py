"""Drawings of the runs in a run directory."""

import json

import pytest

from experiments import goodput_sweep
from experiments.chrome_trace import draw
from experiments.runs.saved_run import Point, SavedRun
from tests.commands import run_command
from tests.drawings import by_lane, check_trace, lane_names, slices
from tests.experiments.test_goodput_sweep import config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Per device 0.5 requests/s, which pass, and 5000, which do not; 2 seeds each."""
    out = tmp_path_factory.mktemp("runs") / "run"
    goodput_sweep.run(config("durations=modelled", "rates=0.5,5000"), out, None)
    return out


def rows_of(run, point):
    return SavedRun(run).requests(point)


@pytest.mark.parametrize("rate_rps", [0.5, 5000.0])
@pytest.mark.parametrize("system", ["vllm_v0", "disaggregated"])
def test_a_point(run, system, rate_rps):
    trace = draw(run, system, rate_rps, seed=1)
    check_trace(trace)
    rows = rows_of(run, Point(system, rate_rps * 2, 1))
    names = [f"request {row['request_id']}" for row in rows]
    assert lane_names(trace)["requests"] == names
    assert len(lane_names(trace)["devices"]) == 2
    for name, row in zip(names, rows, strict=True):
        stages = by_lane(trace, "requests")[name]
        total_s = sum(end_s - start_s for _, start_s, end_s in stages)
        assert total_s == pytest.approx(row["e2e_s"], abs=1e-8)
        spent_s = sum(end - start for stage, start, end in stages if stage == "prefill")
        assert spent_s == pytest.approx(row["prefill_s"], abs=1e-8)
    moved = {row["request_id"] for row in rows if row["transfer_bytes"]}
    assert {args["request"] for *_, args in slices(trace, "links")} == moved
    assert bool(moved) == (system == "disaggregated")


def test_by_default_the_highest_rate_that_passes_and_the_first_seed(run):
    assert draw(run, "vllm_v0", None, None) == draw(run, "vllm_v0", 0.5, 0)
    assert draw(run, "vllm_v0", None, None) != draw(run, "vllm_v0", 0.5, 1)
    about = draw(run, "vllm_v0", None, None)["otherData"]
    assert (about["system"], about["rate_rps_per_device"]) == ("vllm_v0", 0.5)
    assert (about["clock"], about["durations"]) == ("virtual", "modelled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"system": "vlm"},
            r"--system: expected one of \['disaggregated', 'vllm_v0'\]",
        ),
        ({"rate_rps": 1.0}, r"--rate: expected one of \['0.5', '5000'\], got '1'"),
        ({"seed": 7}, r"--seed: expected one of \[0, 1\], got 7"),
    ],
)
def test_what_is_there_is_said(run, change, message):
    asked = {"system": "vllm_v0", "rate_rps": None, "seed": None, **change}
    with pytest.raises(ValueError, match=message):
        draw(run, **asked)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="--run: expected a run directory, got"):
        draw(tmp_path, "vllm_v0", None, None)


def test_a_run_that_did_not_end_needs_a_rate(run, tmp_path):
    for name in ("config.json", "points"):
        (tmp_path / name).symlink_to(run / name)
    with pytest.raises(ValueError, match=r"'5000'\], or .* got 'no summary.json'"):
        draw(tmp_path, "vllm_v0", None, None)
    check_trace(draw(tmp_path, "vllm_v0", 5000.0, None))


def test_the_command_line(run, tmp_path):
    command = ["chrome_trace", f"--run={run}"]
    out = tmp_path / "trace.json"
    flags = ["--system=disaggregated", "--rate=5000", f"--out={out}"]
    done = run_command(*command, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == draw(run, "disaggregated", 5000.0, None)
    done = run_command(*command, "--system=x")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --system: expected")
