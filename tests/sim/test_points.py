"""Workloads: the same requests for everyone."""

import numpy as np
import pytest

from disagg_jax.lengths import UniformLengths
from disagg_jax.sim.points import SimWorkload, TraceWorkload
from disagg_jax.traces import TraceRow

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


def test_seeds_begin_at_different_places():
    starts = {lengths(TRACE.requests(3, 1.0, seed))[0] for seed in range(40)}
    assert len(starts) == len(ROWS)


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
    ],
)
def test_bad_traces(rows, message):
    with pytest.raises(ValueError, match=message):
        TraceWorkload(rows=rows)
