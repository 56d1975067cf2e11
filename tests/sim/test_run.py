"""Workloads: the same requests for everyone."""

import math

import numpy as np
import pytest

from disagg_jax.sim.run import SimWorkload, TraceWorkload
from disagg_jax.workload.lengths import UniformLengths
from disagg_jax.workload.requests import Arrivals
from disagg_jax.workload.traces import TraceRow

ROWS = tuple(
    TraceRow(arrival_s=float(at), prompt_tokens=10 + i, output_tokens=1 + i)
    for i, at in enumerate([0, 1, 1, 5, 6, 10])
)
TRACE = TraceWorkload(rows=ROWS)
DRAWN = SimWorkload(
    prompt=UniformLengths(low=1, high=9), output=UniformLengths(low=2, high=5)
)


def gaps(requests):
    return np.diff([request.arrival_s for request in requests])


def lengths(requests):
    return [(request.prompt_tokens, request.max_tokens) for request in requests]


@pytest.mark.parametrize("workload", [TRACE, DRAWN])
def test_equal_seeds_give_equal_requests_and_another_rate_stretches_them(workload):
    slow, fast = (workload.requests(20, rate, 3) for rate in (0.5, 2.0))
    assert slow == workload.requests(20, 0.5, 3)
    assert lengths(slow) == lengths(fast)
    np.testing.assert_allclose(gaps(slow), 4 * gaps(fast))
    assert lengths(workload.requests(8, 0.5, 3)) == lengths(slow)[:8]


@pytest.mark.parametrize("workload", [TRACE, DRAWN])
def test_prompts_only(workload):
    whole, prompts = (
        w.requests(9, 1.0, 1) for w in (workload, workload.prompts_only())
    )
    assert [r.prompt_tokens for r in whole] == [r.prompt_tokens for r in prompts]
    assert {r.max_tokens for r in prompts} == {1}


def test_a_trace_keeps_its_rows_and_gaps_and_begins_again():
    n = 2 * len(ROWS)
    requests = TRACE.requests(n, 1.0, 0)
    # 19 rows from somewhere in the trace, whose own gaps are 1 0 4 1 4, and 2, the
    # mean, where it begins again.
    start = lengths(requests)[0][0] - 10
    order = [(start + i) % len(ROWS) for i in range(n)]
    assert lengths(requests) == [(10 + i, 1 + i) for i in order]
    own = [[1, 0, 4, 1, 4, 2][i] for i in order[:-1]]
    np.testing.assert_allclose(gaps(requests), np.array(own) * (n - 1) / sum(own))
    # The mean rate is what was asked for.
    assert requests[-1].arrival_s == pytest.approx(n - 1)


def test_seeds_have_rows_of_their_own_until_there_are_no_more():
    first, second = (lengths(TRACE.requests(3, 1.0, seed)) for seed in (0, 1))
    assert not set(first) & set(second)
    assert TRACE.why_dependent(3, (0, 1)) == ""
    assert "3 runs x 3 requests share the 6 rows" in TRACE.why_dependent(3, (0, 1, 2))
    assert DRAWN.why_dependent(10**6, range(100)) == ""


def test_rows_of_one_tick_are_spread_over_it_unless_kept():
    """Rows in memory, of a clock that ticks every 3 s."""
    rows = tuple(TraceRow(3.0 * (i // 4), 1 + i, 1) for i in range(12))
    even = [1.0] * 11
    np.testing.assert_allclose(
        gaps(TraceWorkload(rows=rows).requests(12, 1.0, 0)), even
    )
    # Rows that are too long take their part of the tick with them.
    some = TraceWorkload.fitting(rows, 8)
    np.testing.assert_allclose([r.arrival_s for r in some.rows], 0.75 * np.arange(7))
    assert "rows of one tick of the clock are spread" in some.notes[0]
    kept = TraceWorkload(rows=rows, ties="keep")
    assert [row.arrival_s for row in kept.rows] == [0] * 4 + [3] * 4 + [6] * 4
    assert TraceWorkload.fitting(rows, 99, ties="keep").rows == kept.rows


def test_rows_without_times_arrive_as_the_workload_says():
    rows = tuple(TraceRow(math.nan, 1 + i, 1) for i in range(8))
    workload = TraceWorkload(rows=rows, arrivals=Arrivals(kind="fixed"))
    np.testing.assert_allclose(gaps(workload.requests(20, 4.0, 0)), 0.25)
    drawn = [gaps(TraceWorkload(rows=rows).requests(8, 1.0, i)) for i in (0, 1)]
    assert not np.allclose(*drawn)


def test_one_request_and_two_at_the_same_time():
    for seed in range(40):
        for n in (1, 2):
            requests = TRACE.requests(n, 7.0, seed)
            assert len(requests) == n
            assert requests[0].arrival_s == 0


def test_rows_that_fit():
    rows = [*ROWS, TraceRow(11.0, 0, 5), TraceRow(12.0, 5, 0), TraceRow(13.0, 90, 11)]
    assert TraceWorkload.fitting(rows, 100) == TRACE
    assert len(TraceWorkload.fitting(rows, 101).rows) == len(ROWS) + 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:1], "trace: expected two rows or more, got 1"),
        (ROWS[1:3], "trace: expected a span > 0 s, got 0.0"),
        ((*ROWS, TraceRow(11.0, 0, 5)), "trace: expected rows with tokens only, got 0"),
        (ROWS[::-1], "trace: expected rows in time order"),
        (
            [TraceRow(t, 1, 1) for t in sorted([0.123457, 2.71828, 99.0] * 5)],
            "expected most rows at times of their own, or ties='keep'.* got '12 of 15",
        ),
    ],
)
def test_bad_traces(rows, message):
    with pytest.raises(ValueError, match=message):
        TraceWorkload(rows=rows)
