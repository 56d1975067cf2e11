"""Listed shapes: they hold what a policy can ask for, and are few."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.batch import DecodeShape, PrefillShape
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.executor import full_slices
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_first import PrefillFirst
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.view import StepLimits
from disagg_jax.work import Slice
from tests.engine.harness import make_request

MEMORIES = st.builds(
    KVMemory,
    num_blocks=st.integers(1, 3000),
    block_tokens=st.sampled_from([1, 4, 16]),
    max_context=st.integers(2, 9000),
)
LIMITS = st.builds(
    StepLimits,
    prefill_tokens=st.integers(1, 5000),
    prefill_rows=st.integers(1, 300),
    decode_rows=st.integers(1, 300),
)


def longest_of(memory: KVMemory) -> int:
    """Tokens of the longest request that an instance can hold."""
    return min(memory.max_context, memory.num_blocks * memory.block_tokens)


@given(LIMITS, MEMORIES, st.data())
def test_whatever_a_policy_may_prefill_has_a_shape(limits, memory, data):
    """Up to its limits together, or one request of any length alone."""
    buckets = Buckets.for_limits(limits, memory)
    rows = data.draw(st.integers(1, limits.prefill_rows))
    tokens = data.draw(st.integers(rows, max(rows, limits.prefill_tokens)))
    if tokens > limits.prefill_tokens:
        rows, tokens = 1, data.draw(st.integers(1, longest_of(memory)))
    shape = buckets.prefill_shape(tokens, rows)
    assert shape in buckets.step_shapes
    assert shape.tokens >= tokens and shape.rows >= rows
    smaller = [
        other
        for other in buckets.prefill
        if other.tokens >= tokens and other.rows >= rows and other.tokens < shape.tokens
    ]
    assert not smaller
    longest = longest_of(memory)
    assert buckets.prefill_shape(longest, 1).tokens >= longest


@given(LIMITS, MEMORIES, st.data())
def test_whatever_a_policy_may_decode_has_a_shape(limits, memory, data):
    buckets = Buckets.for_limits(limits, memory)
    rows = data.draw(st.integers(1, limits.decode_rows))
    blocks = data.draw(st.integers(1, memory.num_blocks))
    shape = buckets.decode_shape(rows, blocks)
    assert shape in buckets.step_shapes
    assert rows <= shape.rows <= max(2 * rows, 1)
    assert blocks <= shape.blocks <= max(16, 4 * blocks)
    assert shape.blocks <= memory.num_blocks  # the scratch block is never read


@given(LIMITS, MEMORIES, st.data())
def test_whatever_is_handed_over_has_a_size(limits, memory, data):
    buckets = Buckets.for_limits(limits, memory)
    blocks = data.draw(st.integers(1, memory.blocks_for(longest_of(memory))))
    assert blocks <= buckets.transfer_size(blocks) <= 2 * blocks


@given(LIMITS, MEMORIES)
def test_listed_sizes_rise(limits, memory):
    buckets = Buckets.for_limits(limits, memory)
    for sizes in dataclasses.astuple(buckets):
        assert list(sizes) == sorted(set(sizes))
    rows = [shape.rows for shape in buckets.prefill]
    assert rows == sorted(rows) and min(rows) >= 1


@pytest.mark.parametrize("max_seqs", [16, 64])
@pytest.mark.parametrize("max_context", [1024, 8192])
@pytest.mark.parametrize("share", [1, 4])
def test_shapes_are_a_few_dozen(max_seqs, max_context, share):
    """Pools for all requests at their longest, and for a quarter of that."""
    memory = KVMemory(
        num_blocks=max_seqs * max_context // 16 // share, max_context=max_context
    )
    for policy, most in (
        (PrefillFirst(max_seqs=max_seqs), 66),
        (PrefillOnly(), 24),
        (DecodeOnly(max_seqs=max_seqs), 49),
    ):
        buckets = Buckets.for_limits(policy.limits, memory)
        assert len(buckets.step_shapes) <= most, policy
        assert len(buckets.transfer_blocks) <= 24


def test_roles_list_only_what_they_do():
    memory = KVMemory(num_blocks=64, max_context=256)
    prefill = Buckets.for_limits(PrefillOnly().limits, memory)
    assert prefill.prefill and not prefill.decode_rows and not prefill.pool_blocks
    decode = Buckets.for_limits(DecodeOnly().limits, memory)
    assert decode.decode_rows and decode.pool_blocks and not decode.prefill


@given(LIMITS, MEMORIES)
def test_slices_for_timing_need_exactly_their_shape(limits, memory):
    """Otherwise a table of step times would lack it, or hold another's time."""
    assume(memory.block_tokens > 1)  # a decode of 1 token on a block of 1 is a prompt
    buckets = Buckets.for_limits(limits, memory)
    for shape in (*buckets.step_shapes[:4], *buckets.step_shapes[-4:]):
        slices = full_slices(shape, memory)
        assert buckets.step_shape(slices, memory.block_tokens) == shape


def make_slice(start, count, blocks, samples=True) -> Slice:
    request = make_request(0, start + count, 4)
    return Slice(request, start, count, samples, blocks, (0,) * count)


def test_shape_of_a_step_by_example():
    buckets = Buckets(
        prefill=(PrefillShape(32, 4), PrefillShape(64, 8)),
        decode_rows=(1, 4),
        pool_blocks=(16, 64),
        transfer_blocks=(1,),
    )
    one = make_slice(7, 1, (3, 15))
    far = make_slice(7, 1, (3, 16))
    assert buckets.step_shape([one], 4) == DecodeShape(1, 16)
    assert buckets.step_shape([one, one], 4) == DecodeShape(4, 16)
    assert buckets.step_shape([one, far], 4) == DecodeShape(4, 64)
    # A prompt of one token is no decode; five prompts need more rows.
    assert buckets.step_shape([make_slice(0, 1, (40,))], 4) == PrefillShape(32, 4)
    assert buckets.step_shape([make_slice(0, 33, (0, 1))], 4) == PrefillShape(64, 8)
    assert buckets.step_shape([make_slice(0, 1, (0,))] * 5, 4) == PrefillShape(64, 8)
    for chunk in (make_slice(4, 2, (0,)), make_slice(0, 2, (0,), samples=False)):
        with pytest.raises(ValueError, match="whole prompts or decodes only"):
            buckets.step_shape([chunk], 4)
