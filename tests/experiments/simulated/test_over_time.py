"""Latencies and queues over time, of timelines made by hand."""

import pytest

from disagg_jax.metrics import ttft_s
from disagg_jax.request import Status
from experiments.simulated.over_time import (
    WINDOWS,
    counts_over_time,
    percentile_over_time,
)
from tests.timelines import DISAGGREGATED, served


def test_percentiles_of_windows_of_arrivals():
    """Windows of 1 s: two requests in the first, one in the last; one was refused."""
    last = float(WINDOWS)
    timelines = [
        served([1.0], arrival_s=0.0),
        served([3.5], arrival_s=0.5),
        served([], arrival_s=2.5, status=Status.REFUSED, end_s=2.5),
        served([last + 4], arrival_s=last),
    ]
    # TTFTs of 1 and 3, then 4.
    found = percentile_over_time(timelines, ttft_s, 50)
    assert found == [(0.5, 2.0), (last - 0.5, 4.0)]


def test_arrivals_at_one_time_are_one_window():
    timelines = [served([1.0]), served([3.0])]
    assert percentile_over_time(timelines, ttft_s, 50) == [(0.5, 2.0)]


def test_the_mean_number_in_each_stage():
    """One request from 1 to 11 s, twice; windows of 0.25 s cut its stages evenly."""
    end_s = WINDOWS / 4
    found = counts_over_time([DISAGGREGATED, DISAGGREGATED], end_s)
    stages_s = {
        "prefill_queue": [(1, 2)],
        "prefill": [(2, 4)],
        "transfer": [(5, 7)],
        "decode_queue": [(4, 5), (7, 7.5)],
        "decode": [(7.5, 11)],
    }
    for stage, spans in stages_s.items():
        for i, (middle_s, count) in enumerate(found[stage]):
            assert middle_s == pytest.approx(0.25 * (i + 0.5))
            inside = any(start <= middle_s <= end for start, end in spans)
            assert count == pytest.approx(2.0 if inside else 0.0, abs=1e-9)


def test_a_window_that_a_stage_half_fills():
    found = counts_over_time([served([1.5, 2.0])], float(WINDOWS))
    # Prefill from 0 to 1.5, decode from 1.5 to 2, in windows of 1 s.
    assert [count for _, count in found["prefill"][:3]] == [1.0, 0.5, 0.0]
    assert [count for _, count in found["decode"][:3]] == [0.0, 0.5, 0.0]


def test_a_run_in_which_nothing_finished_has_empty_stages():
    refused = served([], status=Status.REFUSED, end_s=0.0)
    found = counts_over_time([refused], 0.0)
    assert {count for points in found.values() for _, count in points} == {0.0}
