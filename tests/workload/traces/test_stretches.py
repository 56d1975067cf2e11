"""Which rows each seed gets."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.workload.traces import TraceRow
from disagg_jax.workload.traces.stretches import stretch, why_shared

ROWS = [TraceRow(float(i * i), i + 1, 1) for i in range(60)]


def taken(n, seed, count):
    return [row.prompt_tokens for row in stretch(ROWS[:count], n, seed)]


@given(
    st.integers(2, 60),
    st.integers(1, 70),
    st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
)
def test_runs_share_rows_just_when_it_says_so(count, n, seeds):
    rows = [set(taken(n, seed, count)) for seed in seeds]
    shared = any(a & b for a, b in itertools.combinations(rows, 2))
    assert bool(why_shared(seeds, n, count, "rows")) == shared


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 30))
def test_neighbouring_seeds_share_none_while_there_are_enough(n, runs, first):
    seeds = range(first, first + runs)
    assert not why_shared(seeds, n, 60, "rows")


@given(st.integers(2, 60), st.integers(1, 70), st.integers(0, 9))
def test_a_stretch_has_its_rows_in_order_and_goes_round(count, n, seed):
    found = stretch(ROWS[:count], n, seed)
    assert len(found) == n
    for (a, first, _), (b, then, _) in itertools.pairwise(found):
        assert then == first % count + 1
        assert b > a  # also where the trace begins again


def test_one_row_that_is_shared_is_enough():
    assert why_shared((0, 1, 2), 4, 11, "rows")  # rows 8 to 11, and there are 11
    assert not why_shared((0, 1, 2), 4, 12, "rows")


def test_the_reason():
    assert why_shared((0, 1, 2), 100, 250, "rows of the trace") == (
        "3 runs x 100 requests share the 250 rows of the trace, so they are no "
        "independent samples"
    )
    assert why_shared((0, 3), 100, 300, "rows") == (
        "seeds 0, 3: 2 runs x 100 requests share the 300 rows, so they are no "
        "independent samples"
    )
    # Just enough for both, but they have the same: 2 x 100 goes round to 0.
    assert why_shared((0, 2), 100, 200, "rows").startswith("seeds 0, 2: 2 runs")
    assert why_shared((0, 1), 100, 199, "rows").startswith("2 runs")


def test_runs_longer_than_the_trace_begin_at_different_rows():
    for n in (60, 120):  # or just as long
        assert len({taken(n, seed, 60)[0] for seed in range(5)}) == 5
