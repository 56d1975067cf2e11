"""Head layouts: any number of heads on any number of devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.heads import head_layout

HEADS = st.tuples(st.integers(1, 12), st.integers(1, 8))  # kv heads, queries of each
TP = st.sampled_from([1, 2, 3, 4, 8, 16])


@given(HEADS, TP)
def test_every_head_is_there_and_devices_have_equally_many(heads, tp):
    kv_heads, group = heads
    layout = head_layout(kv_heads * group, kv_heads, tp)
    assert {head for head in layout.kv if head is not None} == set(range(kv_heads))
    queries = [head for head in layout.q if head is not None]
    assert sorted(queries) == list(range(kv_heads * group))  # each exactly once
    assert len(layout.kv) % tp == 0 and len(layout.q) % tp == 0


@given(HEADS, TP)
def test_queries_stay_with_their_kv_head(heads, tp):
    """Slot i of the queries belongs to slot i // (their ratio) of the kv heads."""
    kv_heads, group = heads
    layout = head_layout(kv_heads * group, kv_heads, tp)
    assert len(layout.q) % len(layout.kv) == 0
    ratio = len(layout.q) // len(layout.kv)
    for slot, query in enumerate(layout.q):
        kv = layout.kv[slot // ratio]
        assert (query is None) == (kv is None)
        assert query is None or query // group == kv


@given(HEADS, TP)
def test_memory_is_wasted_only_where_it_must_be(heads, tp):
    """No more slots than rounding the kv heads up, or one for each device."""
    kv_heads, group = heads
    layout = head_layout(kv_heads * group, kv_heads, tp)
    assert len(layout.kv) == -(-kv_heads // tp) * tp


@pytest.mark.parametrize(
    "q_heads, kv_heads, tp, kv, q",
    [
        (4, 2, 2, (0, 1), (0, 1, 2, 3)),
        (4, 2, 4, (0, 0, 1, 1), (0, 1, 2, 3)),  # repeated
        (2, 2, 4, (0, 1, None, None), (0, 1, None, None)),  # no queries to divide
        (6, 3, 2, (0, 1, 2, None), (0, 1, 2, 3, 4, 5, None, None)),  # padded
        (9, 3, 1, (0, 1, 2), tuple(range(9))),
    ],
)
def test_by_example(q_heads, kv_heads, tp, kv, q):
    layout = head_layout(q_heads, kv_heads, tp)
    assert (layout.kv, layout.q) == (kv, q)
