"""Requests made of a trace's rows, and what becomes of the other rows."""

import math

import pytest

from disagg_jax.workload.requests import Arrivals
from disagg_jax.workload.traces import TraceRow, fit_rows, requests_from_trace
from disagg_jax.workload.traces.requests import stretch_requests


def column(requests, name):
    return [getattr(request, name) for request in requests]


ROWS = [
    TraceRow(3.0, 100, 10),
    TraceRow(4.0, 100, 0),  # nothing to generate
    TraceRow(5.0, 900, 10),  # prompt too long for 500
    TraceRow(6.0, 500, 30),  # output too long for 20
    TraceRow(7.0, 200, 20),
]


class TestRequestsFromTrace:
    def make(self, rows=ROWS, **changes):
        return requests_from_trace(rows, seed=0, **changes)

    def test_own_times_from_zero(self):
        made = self.make()
        assert column(made.requests, "arrival_s") == [
            0,
            2,
            3,
            4,
        ]  # the empty row is out
        assert column(made.requests, "id") == [0, 1, 2, 3]
        assert (made.dropped_empty, made.dropped_long, made.clipped) == (1, 0, 0)

    def test_long_rows_are_dropped_and_counted(self):
        made = self.make(max_prompt_tokens=500, max_output_tokens=20)
        assert column(made.requests, "prompt_tokens") == [100, 200]
        assert (made.dropped_empty, made.dropped_long, made.clipped) == (1, 2, 0)

    def test_long_rows_are_clipped_and_counted(self):
        made = self.make(max_prompt_tokens=500, max_output_tokens=20, too_long="clip")
        assert column(made.requests, "prompt_tokens") == [100, 500, 500, 200]
        assert column(made.requests, "max_tokens") == [10, 10, 20, 20]
        assert (made.dropped_empty, made.dropped_long, made.clipped) == (1, 0, 2)

    def test_rate(self):
        # Four rows over 4 s are 3 gaps: 0.75 a second; at 1.5 it takes half the time.
        made = self.make(rate_rps=1.5)
        assert column(made.requests, "arrival_s") == [0, 1, 1.5, 2]

    def test_first_n(self):
        made = self.make(n=2)
        assert column(made.requests, "arrival_s") == [0, 2]
        assert made.dropped_empty == 1

    def test_prompts(self):
        (first, *_) = self.make(vocab_size=7).requests
        assert len(first.prompt) == 100 and max(first.prompt) <= 6

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n": 5}, "expected 5 rows to serve, got {'fits': 4, 'empty': 1}"),
            ({"rows": []}, "expected some rows to serve"),
            ({"n": 0}, "n: expected at least one"),
            ({"rate_rps": 0}, "rate_rps: expected > 0"),
            ({"rate_rps": 1, "n": 1}, "expected a span > 0 s, got 0"),
            ({"max_prompt_tokens": 0}, "maximum: expected >= 1 token, got 0"),
            ({"too_long": "cut"}, "expected drop or clip, got 'cut'"),
            ({"rows": ROWS[::-1]}, "rows in time order"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.make(**changes)


def test_the_last_row_of_a_run_that_has_no_span():
    one = stretch_requests(ROWS[:1], 1, 5.0, 0)
    assert column(one, "arrival_s") == [0]


def test_rows_at_one_time_have_no_rate_but_their_trace_may():
    rows = [TraceRow(at, 5 + i, 1) for i, at in enumerate([3.0, 3.0, 5.0, 6.0])]
    found = [stretch_requests(rows, 2, 4.0, seed) for seed in (0, 1)]
    # The first two come together; the others a quarter of a second apart.
    assert [column(run, "arrival_s") for run in found] == [[0, 0], [0, 0.25]]
    assert [column(run, "prompt_tokens") for run in found] == [[5, 6], [7, 8]]


def test_rows_over_a_total_are_dropped():
    fitted = fit_rows(ROWS, max_total_tokens=500)
    assert [row.prompt_tokens for row in fitted.rows] == [100, 200]
    assert fitted.said("500 tokens") == (
        "1 of 5 rows are left out: no prompt or output tokens",
        "2 of 5 rows are left out: over 500 tokens",
    )
    with pytest.raises(ValueError, match="expected none where rows are clipped"):
        fit_rows(ROWS, max_total_tokens=500, too_long="clip")


def test_no_more_rows_are_taken_than_are_asked_for():
    taken = []
    rows = (taken.append(row) or row for row in ROWS)
    fitted = fit_rows(rows, n=2)
    assert [row.prompt_tokens for row in fitted.rows] == [100, 900]
    assert (len(taken), fitted.dropped_empty) == (4, 1)  # the next one is looked at


def test_rows_without_times_arrive_as_they_are_asked_to():
    rows = [TraceRow(math.nan, 10 + i, 5) for i in range(4)]
    fixed = Arrivals(kind="fixed")
    made = requests_from_trace(rows, seed=0, rate_rps=2.0, arrivals=fixed)
    assert column(made.requests, "arrival_s") == [0.5, 1, 1.5, 2]
    assert column(made.requests, "prompt_tokens") == [10, 11, 12, 13]
    with pytest.raises(ValueError, match="rate: expected one for a trace without"):
        requests_from_trace(rows, seed=0)


def test_rows_of_a_coarse_clock_are_spread_before_they_are_stretched():
    rows = [TraceRow(3.0 * (i // 3), 1, 1) for i in range(9)]
    made = requests_from_trace(rows, seed=0, rate_rps=1.0)
    assert column(made.requests, "arrival_s") == pytest.approx(range(9))
    kept = requests_from_trace(rows, seed=0, rate_rps=1.0, ties="keep")
    assert column(kept.requests, "arrival_s") == [0, 0, 0, 4, 4, 4, 8, 8, 8]
