"""One run's keys, each worked out by hand from the stamps."""

import itertools
import json

import pytest

from disagg_jax.metrics.summary import percentiles, span_s, summarise
from disagg_jax.request import Status
from tests.timelines import DISAGGREGATED, SLO_1, served


def test_percentiles():
    # numpy's linear rule on 0..10: the p-th percentile is p / 10.
    found = percentiles([float(x) for x in range(11)], (50, 90, 99.5))
    assert found == {"p50": 5, "p90": 9, "p99.5": pytest.approx(9.95)}
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}


def test_a_run_is_from_the_first_arrival_to_the_last_end_in_whatever_order():
    late, early = served([6.0, 7.0], arrival_s=5.0), served([2.0, 9.0], arrival_s=1.0)
    for run in ([late, early], [early, late]):
        assert span_s(run) == summarise(run, SLO_1, devices=1)["duration"] == 8.0
    refused = served([], arrival_s=0.5, end_s=0.5, status=Status.REFUSED)
    assert span_s([late, refused]) == 6.5
    assert span_s([refused]) is None  # no time passed


def test_by_hand():
    run = [
        served([0.5, 1.0, 2.0], dropped_s=[0.6, 1.0]),  # TTFT .5, TPOT .75, misses TPOT
        served([3.0], arrival_s=2.0, transfer_bytes=64),  # TTFT 1, one token: good
        # Not finished, but its KV moved and it was preempted.
        served(
            [],
            arrival_s=3.0,
            end_s=4.0,
            status=Status.CANCELLED,
            transfer_bytes=32,
            dropped_s=[3.5],
        ),
    ]
    summary = summarise(run, SLO_1, devices=2)
    expected = {
        "duration": 4.0,  # from 0 to the cancellation at 4
        "num_prompts": 3,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,  # 10 each, of finished ones
        "total_output_tokens": 4,
        "request_throughput": 0.5,  # 2 / 4
        "request_goodput": 0.25,  # 1 / 4
        "request_goodput_per_device": 0.125,
        "output_throughput": 1.0,
        "total_token_throughput": 6.0,  # 24 / 4
        "attainment": 1 / 3,
        "attainment_ttft": 2 / 3,
        "attainment_tpot": 1 / 3,
        "mean_ttft_ms": 750.0,
        "std_ttft_ms": 250.0,  # over n, as vLLM
        "p90_ttft_ms": 950.0,  # .5 + .9 * (1 - .5)
        "mean_tpot_ms": 750.0,  # the one-token request is left out
        "median_itl_ms": 750.0,  # of .5 and 1
        "mean_e2el_ms": 1500.0,  # of 2 and 1
        "mean_prefill_ms": 750.0,  # of .5 and 1
        "mean_decode_ms": 750.0,  # of 1.5 and 0
        "preemptions": 3,
        "transfer_bytes": 96,
    }
    assert {k: summary[k] for k in expected} == pytest.approx(expected)


def test_latencies_are_in_ms_under_their_own_names():
    """TTFT 1, 2 and 5 s; gaps of 1 and 3, 2, 4 s; queued for 0.5, 1 and 4 s."""
    run = [
        served([1.0, 2.0, 5.0], prefill_start_s=0.5),
        served([2.0, 4.0], prefill_start_s=1.0, transfer_start_s=2.25),
        served([5.0, 9.0], prefill_start_s=4.0, dropped_s=[6.0]),
    ]
    run[1].transfer_end_s, run[1].decode_start_s = 2.75, 3.5
    summary = summarise(run, SLO_1, devices=4, duration_s=10.0)
    expected = {
        "devices": 4,
        "duration": 10.0,
        "mean_ttft_ms": 8000 / 3,
        "median_ttft_ms": 2000.0,
        "p50_ttft_ms": 2000.0,
        "p90_ttft_ms": 4400.0,  # 2 + 0.8 x 3
        "p99_ttft_ms": 4940.0,  # 2 + 0.98 x 3
        "mean_tpot_ms": 8000 / 3,  # of 2, 2 and 4
        "p90_tpot_ms": 3600.0,  # 2 + 0.8 x 2
        "mean_itl_ms": 2500.0,  # of 1, 3, 2 and 4: all gaps count alike
        "p90_itl_ms": 3700.0,  # 3 + 0.7
        "mean_e2el_ms": 6000.0,  # of 5, 4 and 9
        "p99_e2el_ms": 8920.0,  # 5 + 0.98 x 4
        "std_e2el_ms": (14 / 3) ** 0.5 * 1e3,  # of -1, -2 and 3
        "mean_prefill_queue_ms": 5500 / 3,
        "mean_prefill_ms": 2500 / 3,  # 0.5, 1 and 1
        "mean_transfer_ms": 500 / 3,
        "mean_decode_queue_ms": 1000 / 3,  # 0.25 for the pull, 0.75 for a step
        "mean_decode_ms": (4000 + 500 + 4000) / 3,
        "output_throughput": 0.7,
        "output_throughput_per_device": 0.175,
        "request_throughput_per_device": 0.075,
        "total_token_throughput_per_device": 3.7 / 4,
        "preemptions": 1,
    }
    assert {k: summary[k] for k in expected} == pytest.approx(expected)


def test_vllm_keys():
    summary = summarise([DISAGGREGATED], SLO_1, devices=1)
    assert summary["duration"] == 10.0  # from its arrival at 1 to its end at 11
    stats = ("mean", "median", "std", "p50", "p90", "p99")
    for stat, name in itertools.product(stats, ("ttft", "tpot", "itl", "e2el")):
        assert isinstance(summary[f"{stat}_{name}_ms"], float)


def test_duration_is_the_callers_where_given():
    summary = summarise([DISAGGREGATED], SLO_1, devices=1, duration_s=20)
    assert (summary["duration"], summary["request_throughput"]) == (20, 0.05)


@pytest.mark.parametrize(
    "run",
    [
        [served([], status=Status.ACTIVE)],  # nothing ended
        [served([], end_s=0.0, status=Status.REFUSED)],  # no time passed
        [served([1.0])],  # no gap, no TPOT
    ],
)
def test_never_nan(run):
    summary = summarise(run, SLO_1, devices=1)
    json.dumps(summary, allow_nan=False)
    assert summary["mean_tpot_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices: expected >= 1"),
        ({"devices": 1, "duration_s": 0}, "duration_s: expected > 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        summarise([DISAGGREGATED], SLO_1, **arguments)
