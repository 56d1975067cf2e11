"""One request of a run directory."""

import pytest

from disagg_jax import metrics
from experiments import goodput_sweep, one_request
from experiments.runs.saved_run import Point, SavedRun
from tests.commands import run_command
from tests.experiments.test_goodput_sweep import config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Per device 0.5 requests/s, which pass, and 5000, which do not; 2 seeds each."""
    out = tmp_path_factory.mktemp("runs") / "run"
    goodput_sweep.run(config("durations=modelled", "rates=0.5,5000"), out, None)
    return out


def test_by_default_it_is_the_one_in_the_middle(run):
    found = one_request.find(run)
    assert list(found) == [
        "vllm_v0 at 0.5 requests/s",
        "disaggregated at 0.5 requests/s",
    ]
    rows = SavedRun(run).requests(Point("vllm_v0", 1.0, 0))
    middle = sorted(row["e2e_s"] for row in rows)[(len(rows) - 1) // 2]
    assert metrics.e2e_s(found["vllm_v0 at 0.5 requests/s"]) == middle
    assert len({timeline.request.id for timeline in found.values()}) == 1


def test_a_rate_and_a_request(run):
    found = one_request.find(run, 5000.0, 3)
    timeline = found["disaggregated at 5000 requests/s"]
    (row,) = (
        row
        for row in SavedRun(run).requests(Point("disaggregated", 10_000.0, 0))
        if row["request_id"] == 3
    )
    line = one_request.table(found).splitlines()[3].split()
    assert line[0] == "disaggregated"
    assert line[-7:] == [
        f"{row[name] * 1e3:.2f}"
        for name in (
            *("prefill_queue_s", "prefill_s", "transfer_s", "decode_queue_s"),
            *("decode_s", "ttft_s", "tpot_s"),
        )
    ]
    assert timeline.request.id == 3


@pytest.mark.parametrize(
    ("rate", "request_id", "message"),
    [
        (1.0, None, r"--rate: expected one of \['0.5', '5000'\], got '1'"),
        (0.5, 10**6, "--request: expected one that vllm_v0 finished, got 1000000"),
    ],
)
def test_what_is_not_there(run, rate, request_id, message):
    with pytest.raises(ValueError, match=message):
        one_request.find(run, rate, request_id)


def test_no_run_directory(tmp_path):
    with pytest.raises(ValueError, match="--run: expected a run directory"):
        one_request.find(tmp_path)


def test_the_caption_says_what_was_run(run):
    assert one_request.said(run) == "tiny on cpu, 6 requests a run, seed 0"


def test_the_command_draws(run):
    done = run_command("one_request", f"--run={run}")
    assert done.returncode == 0, done.stderr
    assert "prefill queue" in done.stdout
    assert (run / "one_request.png").stat().st_size > 1000
