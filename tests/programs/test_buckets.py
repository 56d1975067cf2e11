"""Listed shapes: they hold what a policy can ask for, and are few."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention.packing import pack
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.programs.slices import full_slices, typical_slices
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import StepLimits
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.work import Slice, StepLoad
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

MIXED_LIMITS = st.builds(
    StepLimits,
    prefill_tokens=st.integers(1, 5000),
    prefill_rows=st.integers(1, 300),
    decode_rows=st.integers(0, 300),
    mixed=st.just(True),
    splits=st.booleans(),
)


def longest_of(memory: KVMemory) -> int:
    """Tokens of the longest request that an instance can hold."""
    return min(memory.max_context, memory.num_blocks * memory.block_tokens)


def prompts_shape(buckets, tokens, rows) -> StepShape:
    """The shape of `rows` prompts of `tokens` tokens together."""
    chunks = ((0, tokens - rows + 1), *[(0, 1)] * (rows - 1))
    return buckets.load_shape(StepLoad(chunks, 0, 0), block_tokens=16)


@given(LIMITS, MEMORIES, st.data())
def test_whatever_a_policy_may_prefill_has_a_shape(limits, memory, data):
    """Up to its limits together, or one request of any length alone."""
    buckets = Buckets.for_limits(limits, memory)
    rows = data.draw(st.integers(1, limits.prefill_rows))
    tokens = data.draw(st.integers(rows, max(rows, limits.prefill_tokens)))
    if tokens > limits.prefill_tokens:
        rows, tokens = 1, data.draw(st.integers(1, longest_of(memory)))
    shape = prompts_shape(buckets, tokens, rows)
    assert shape in buckets.step_shapes
    assert shape.tokens >= tokens and shape.rows >= rows
    smaller = [
        other
        for other in buckets.prefill
        if other.tokens >= tokens and other.rows >= rows and other.tokens < shape.tokens
    ]
    assert not smaller
    longest = longest_of(memory)
    assert prompts_shape(buckets, longest, 1).tokens >= longest


@given(LIMITS, MEMORIES, st.data())
def test_whatever_a_policy_may_decode_has_a_shape(limits, memory, data):
    buckets = Buckets.for_limits(limits, memory)
    rows = data.draw(st.integers(1, limits.decode_rows))
    rows = min(rows, memory.num_blocks)
    blocks = data.draw(st.integers(rows, memory.num_blocks))
    load = StepLoad((), rows, rows, decode_blocks=blocks)
    shape = buckets.load_shape(load, memory.block_tokens)
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


@pytest.mark.parametrize("budget", [256, 512, 768, 2048])
@pytest.mark.parametrize("max_seqs", [16, 64, 128])
@pytest.mark.parametrize("max_context", [512, 2048, 32_768])
@pytest.mark.parametrize("splits", [False, True])
def test_mixed_shapes_are_two_dozen(splits, max_seqs, max_context, budget):
    memory = KVMemory(num_blocks=max_seqs * max_context // 64, max_context=max_context)
    limits = StepLimits(
        prefill_tokens=budget,
        prefill_rows=max_seqs,
        decode_rows=max_seqs,
        mixed=True,
        splits=splits,
    )
    shapes = Buckets.for_limits(limits, memory).mixed
    assert len(shapes) == len(set(shapes)) <= 4 * 5 + 1
    for shape in shapes:
        assert shape.decodes <= max_seqs
        assert shape.rows <= min(2 * max_seqs, shape.tokens)
        assert not splits or shape.tokens <= budget


def test_roles_list_only_what_they_do():
    memory = KVMemory(num_blocks=64, max_context=256)
    prefill = Buckets.for_limits(PrefillOnly().limits, memory)
    assert prefill.prefill and not prefill.decode_rows and not prefill.pool_blocks
    decode = Buckets.for_limits(DecodeOnly().limits, memory)
    assert decode.decode_rows and decode.pool_blocks and not decode.prefill


@given(MIXED_LIMITS, MEMORIES, st.data())
def test_whatever_a_policy_may_mix_has_a_shape(limits, memory, data):
    """Chunks, or whole prompts, of up to its limits, beside decodes."""
    buckets = Buckets.for_limits(limits, memory)
    assert not buckets.prefill
    size, longest = memory.block_tokens, longest_of(memory)
    free, slices = list(range(memory.num_blocks)), []
    budget = limits.prefill_tokens
    for _ in range(data.draw(st.integers(0, min(limits.prefill_rows, 8)))):
        room = min(len(free) * size, longest)
        if not budget or not room:
            break
        count = data.draw(st.integers(1, min(budget, room)))
        start = data.draw(st.integers(0, room - count)) if limits.splits else 0
        n = memory.blocks_for(start + count)
        slices.append(make_slice(start, count, tuple(free[:n]), samples=False))
        budget, free = budget - count, free[n:]
    for block in reversed(free[-data.draw(st.integers(1, 8)) :]):
        fits = sum(part.is_decode for part in slices) < limits.decode_rows
        if size > 1 and fits and (budget or not limits.splits):
            slices.append(make_slice(size - 1, 1, (block,)))
            budget -= limits.splits
    assume(slices)
    shape = buckets.step_shape(slices)
    assert shape in buckets.step_shapes
    pack(shape, slices, memory)


def test_decodes_have_room_beside_the_longest_prompt():
    """A chunk is no longer than that prompt, but the step's budget may be."""
    memory = KVMemory(num_blocks=64, max_context=128)
    limits = Sarathi(chunk_tokens=256, max_seqs=16).limits
    buckets = Buckets.for_limits(limits, memory)
    prompt = make_slice(0, 128, tuple(range(8)))
    decodes = [make_slice(7, 1, (8 + i,)) for i in range(16)]
    assert buckets.step_shape([prompt, *decodes]).tokens == 128 + 16
    # Where the budget is smaller, decodes are part of it.
    limits = Sarathi(chunk_tokens=64, max_seqs=16).limits
    assert Buckets.for_limits(limits, memory).most_prompt_tokens == 64


@given(LIMITS | MIXED_LIMITS, MEMORIES)
def test_slices_for_timing_need_exactly_their_shape(limits, memory):
    """Otherwise a table of step times would lack it, or hold another's time."""
    assume(memory.block_tokens > 1)  # a decode of 1 token on a block of 1 is a prompt
    # A mixed step of 3 tokens has no place for a chunk that is not like a decode.
    assume(not limits.mixed or min(limits.prefill_tokens, longest_of(memory)) > 3)
    buckets = Buckets.for_limits(limits, memory)
    for shape in (*buckets.step_shapes[:4], *buckets.step_shapes[-4:], *buckets.mixed):
        for slices in (
            full_slices(shape, memory),
            typical_slices(shape, buckets, memory),
        ):
            assert buckets.step_shape(slices) == shape


def test_decodes_are_timed_with_half_of_the_blocks_in_use():
    buckets = Buckets(
        prefill=(),
        decode_rows=(1, 16),
        pool_blocks=(16, 64, 100),
        transfer_blocks=(),
    )
    memory = KVMemory(num_blocks=100, max_context=1600)

    def in_use(rows, blocks):
        shape = StepShape.decode(rows, blocks)
        slices = typical_slices(shape, buckets, memory)
        assert len(slices) == rows
        return sum(len(part.blocks) for part in slices)

    assert [in_use(1, blocks) for blocks in (16, 64, 100)] == [8, 32, 65]
    # Each row has a block of its own.
    assert [in_use(16, blocks) for blocks in (16, 64, 100)] == [16, 32, 65]


def make_slice(start, count, blocks, samples=True) -> Slice:
    request = make_request(0, start + count, 4)
    return Slice(request, start, count, samples, tuple(blocks), (0,) * count)


def test_shape_of_a_step_by_example():
    buckets = Buckets(
        prefill=(StepShape.prefill(32, 4), StepShape.prefill(64, 8)),
        decode_rows=(1, 4),
        pool_blocks=(16, 64),
        transfer_blocks=(1,),
    )
    one, long = make_slice(7, 1, (3, 15)), make_slice(14, 1, range(15))
    assert buckets.step_shape([one]) == StepShape.decode(1, 16)
    assert buckets.step_shape([one, one]) == StepShape.decode(4, 16)
    assert buckets.step_shape([one, long]) == StepShape.decode(4, 64)
    # A prompt of one token is no decode; five prompts need more rows.
    assert buckets.step_shape([make_slice(0, 1, (40,))]) == StepShape.prefill(32, 4)
    assert buckets.step_shape([make_slice(0, 33, (0, 1))]) == StepShape.prefill(64, 8)
    assert buckets.step_shape([make_slice(0, 1, (0,))] * 5) == StepShape.prefill(64, 8)
    for chunk in (make_slice(4, 2, (0,)), make_slice(0, 2, (0,), samples=False)):
        with pytest.raises(ValueError, match="whole prompts or decodes only"):
            buckets.step_shape([chunk])


def test_shape_of_a_mixed_step_by_example():
    shapes = [
        StepShape.mixed(T, 8, C, 4, P)
        for T in (32, 64)
        for C in (8, 40)
        for P in (16, 64)
    ]
    buckets = Buckets(
        prefill=(),
        decode_rows=(4,),
        pool_blocks=(16, 64),
        transfer_blocks=(1,),
        mixed=(*shapes, StepShape.mixed(80, 8, 64, 4, 64)),
    )

    def size(*slices):
        shape = buckets.step_shape(slices)
        return (shape.tokens, shape.context, shape.blocks)

    one, long = make_slice(7, 1, (3, 15)), make_slice(14, 1, range(15))
    fresh, late = make_slice(0, 30, range(8)), make_slice(30, 3, range(9))
    assert size(fresh) == (32, 8, 16)
    assert size(fresh, one) == (32, 8, 16)
    assert size(fresh, one, long) == (32, 8, 64)
    assert size(fresh, one, one, one) == (64, 8, 16)
    assert size(late) == (32, 40, 16)
    assert size(late, fresh, long, one) == (64, 40, 64)
    assert size(make_slice(120, 8, range(32)), late) == (80, 64, 64)
    # Decodes only; a fifth is a chunk; a token of a prompt in its middle is like one.
    assert buckets.step_shape([one] * 4) == StepShape.decode(4, 16)
    assert size(*[one] * 5) == (32, 8, 16)
    middle = dataclasses.replace(one, samples=False)
    assert buckets.step_shape([middle]) == StepShape.decode(4, 16)
    for slices in (
        [make_slice(0, 81, range(21))],
        [make_slice(259, 1, range(65)), *[one] * 4],
        [fresh, make_slice(255, 1, range(64)), one],
        [make_slice(0, 1, (0,))] * 9,
    ):
        with pytest.raises(ValueError, match="mixed: expected .*tokens=80, .* got"):
            buckets.step_shape(slices)
