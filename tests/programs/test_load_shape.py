"""The shape of a load: the one of its slices, up to a guess of the pool's extent."""

import dataclasses
import functools
import itertools
import math
import operator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory
from disagg_jax.programs import Buckets, StepShape, split_decodes
from disagg_jax.programs.buckets import exact_shape, most_context
from disagg_jax.programs.slices import load_slices
from disagg_jax.request import Request
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.work import Slice, StepLoad

# Of all systems, each once: what decodes only is the same in two.
POLICIES = {
    policy: f"{system}-{role}"
    for system, policies in SYSTEMS.items()
    for role, policy in policies.items()
}
MEMORIES = (
    KVMemory(num_blocks=64, max_context=128),
    KVMemory(num_blocks=256, max_context=512),
    KVMemory(num_blocks=32, max_context=512),  # one request of the longest context
    KVMemory(num_blocks=1000, block_tokens=4, max_context=900),
    KVMemory(num_blocks=2048, max_context=2048),
)


@functools.cache
def listed(policy, memory: KVMemory) -> Buckets:
    return Buckets.for_limits(policy.limits, memory)


# ---- natural steps -------------------------------------------------------------------


@st.composite
def loads(draw, limits, memory):
    """(chunks, contexts of decodes): up to a policy's limits and what the pool holds.

    In the controller's form: the last token of a prompt in parts is still a chunk.
    """
    size = memory.block_tokens
    longest = min(memory.max_context, memory.num_blocks * size)
    tokens, free = limits.prefill_tokens, memory.num_blocks
    chunks, contexts = [], []
    for _ in range(draw(st.integers(0, min(limits.prefill_rows, 5)))):
        room = min(longest, free * size)
        if not tokens or not room:
            break
        count = draw(st.integers(1, min(tokens, room)))
        start = draw(st.integers(0, room - count)) if limits.splits else 0
        chunks.append((start, count))
        tokens -= count
        free -= memory.blocks_for(start + count)
    if limits.decode_rows and (limits.mixed or not chunks):
        most = min(limits.decode_rows, tokens if limits.splits else limits.decode_rows)
        few = draw(st.lists(st.integers(2, longest), min_size=1, max_size=6))
        n = draw(st.integers(0, most))
        for context in itertools.islice(itertools.cycle(few), n):
            if (blocks := memory.blocks_for(context)) > free:
                break
            contexts.append(context)
            free -= blocks
    assume(chunks or contexts)
    return tuple(chunks), contexts


def packed(chunks, contexts, memory) -> tuple[Slice, ...]:
    """Slices of a step, with their blocks: decodes came first and have the first.

    Otherwise as `load_slices`, which gives the chunks the first ones.
    """
    slices, first = [], 0
    for start, count in [(context - 1, 1) for context in contexts] + list(chunks):
        blocks = memory.blocks_for(start + count)
        request = Request(id=0, arrival_s=0, prompt_tokens=start + 1, max_tokens=1)
        table = tuple(range(first, first + blocks))
        slices.append(Slice(request, start, count, True, table, (0,) * count))
        first += blocks
    return (*slices[len(contexts) :], *slices[: len(contexts)])


def extents(blocks: int, decodes: int, pool: int) -> tuple[int, int]:
    """The shortest and the longest guess for decodes that have so many blocks.

    Of `decodes` last blocks, each has room for 0 to size - 1 tokens. Half of that is
    assumed, so the sum is off by less than decodes / 2 blocks, and rounded up.
    """
    longest = math.ceil(blocks + decodes / 2 + 1) - 1
    shortest = max(1, math.floor(blocks - decodes / 2) + 1)
    return min(pool, shortest), min(pool, longest)


def assert_is_that_of(slices, found, buckets, memory) -> None:
    """Of prefills and chunks exactly. Of others the extent is a guess, less than
    decodes / 2 + 1 blocks off, so that another is taken only where a listed size lies
    between."""
    taken = buckets.step_shape(slices)
    assert found._replace(blocks=0) == taken._replace(blocks=0)
    most = buckets.decode_rows[-1] if buckets.decode_rows else 0
    parts, decodes = split_decodes(slices, most)
    if found.kind == "prefill" or not decodes:
        assert found == taken
        return
    between = []
    blocks = sum(len(part.blocks) for part in decodes)
    tokens = sum(part.count for part in slices)
    context = sum(len(part.blocks) for part in parts)
    for extent in extents(blocks, len(decodes), memory.num_blocks):
        needed = (tokens, len(slices), context, 0, extent)
        between.append(
            next(
                shape.blocks
                for shape in buckets.step_shapes
                if shape.kind == found.kind and all(map(operator.ge, shape[1:], needed))
            )
        )
    assert between[0] <= found.blocks <= between[1]


@pytest.mark.parametrize("policy", POLICIES, ids=POLICIES.get)
@given(memory=st.sampled_from(MEMORIES), data=st.data())
def test_the_shape_is_the_one_that_the_engine_takes(policy, memory, data):
    buckets = listed(policy, memory)
    chunks, contexts = data.draw(loads(policy.limits, memory))
    load = StepLoad(chunks, len(contexts), sum(contexts))
    found = buckets.load_shape(load, memory.block_tokens)
    slices = packed(chunks, contexts, memory)
    assert_is_that_of(slices, found, buckets, memory)


@pytest.mark.parametrize("policy", POLICIES, ids=POLICIES.get)
@given(memory=st.sampled_from(MEMORIES), data=st.data())
def test_the_shape_is_that_of_the_slices_for_timing(policy, memory, data):
    """All but the extent: `load_slices` lays chunks before decodes, so it is larger by
    their blocks, which no load tells. There it is compared to the decodes' own."""
    buckets = listed(policy, memory)
    chunks, contexts = data.draw(loads(policy.limits, memory))
    n = len(contexts)
    load = StepLoad(chunks, n, n * (sum(contexts) // n) if n else 0)
    slices = load_slices(load, memory)
    found = buckets.load_shape(load, memory.block_tokens)
    assert_is_that_of(slices, found, buckets, memory)


NOTHING = Buckets(prefill=(), decode_rows=(), pool_blocks=(), transfer_blocks=())
LARGE = dataclasses.replace(NOTHING, decode_rows=(64,), pool_blocks=(10**6,))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.sampled_from([1, 4, 16, 17]),
)
def test_the_extent_is_guessed_to_half_a_block_for_each_request(contexts, size):
    blocks = sum(-(-context // size) for context in contexts)
    decodes = len(contexts)
    guess = LARGE.guess_blocks(decodes, sum(contexts), size)
    assert -decodes / 2 < guess - blocks < decodes / 2 + 1
    low, high = extents(blocks, decodes, 10**6)
    assert low <= guess <= high


@given(st.integers(1, 64), st.integers(1, 500), st.sampled_from([1, 4, 16, 17]))
def test_the_context_of_an_extent_is_the_most_it_holds(decodes, blocks, size):
    context = most_context(decodes, blocks, size)
    assert LARGE.guess_blocks(decodes, context, size) <= blocks
    assert LARGE.guess_blocks(decodes, context + 1, size) > blocks


# ---- by example ----------------------------------------------------------------------

MIXED = tuple(
    StepShape.mixed(tokens, 12, context, 8, blocks)
    for tokens in (32, 64)
    for context, blocks in ((4, 4), (9, 16))
)
PREFILLS = (StepShape.prefill(32, 4), StepShape.prefill(64, 8))
DECODES = dataclasses.replace(NOTHING, decode_rows=(1, 2, 8), pool_blocks=(4, 16))
WHOLE = dataclasses.replace(DECODES, prefill=PREFILLS)
MIXES = dataclasses.replace(DECODES, mixed=MIXED)


@pytest.mark.parametrize(
    ("buckets", "load", "expected"),
    [
        (WHOLE, (((0, 30),), 0, 0), "prefill_T32_R4"),
        (WHOLE, (((0, 20), (0, 13)), 0, 0), "prefill_T64_R8"),
        (WHOLE, (((0, 1),) * 5, 0, 0), "prefill_T64_R8"),  # for its rows
        # Half of a last block is 7.5 tokens: 56.5 of 64 are left for one request.
        (WHOLE, ((), 1, 56), "decode_B1_P4"),
        (WHOLE, ((), 1, 57), "decode_B1_P16"),
        (WHOLE, ((), 3, 41), "decode_B8_P4"),  # 64 - 3 x 7.5 = 41.5
        (WHOLE, ((), 3, 42), "decode_B8_P16"),
        # All blocks full: the guess is more than there are. The rows stay few.
        (WHOLE, ((), 1, 256), "decode_B1_P16"),
        (WHOLE, ((), 2, 256), "decode_B2_P16"),
        (MIXES, (((0, 2),), 2, 256), "mixed_T32_C9_P16"),
        (MIXES, (((0, 30),), 0, 0), "mixed_T32_C4_P4"),
        (MIXES, (((0, 30),), 3, 30), "mixed_T64_C4_P4"),
        (MIXES, (((0, 20),), 8, 80), "mixed_T32_C9_P16"),  # 80 + 60 tokens
        (MIXES, (((100, 20),), 0, 0), "mixed_T32_C9_P16"),  # 8 blocks
        # The last token of a prompt is like a decode, where a row is left for it.
        (MIXES, (((20, 1),), 1, 20), "decode_B2_P4"),
        # Two with 28 + 21 and with 29 + 21 tokens; 64 - 2 x 7.5 = 49 fit.
        (MIXES, (((20, 1),), 1, 28), "decode_B2_P4"),
        (MIXES, (((20, 1),), 1, 29), "decode_B2_P16"),
        (MIXES, (((20, 1),), 8, 8), "mixed_T32_C9_P16"),
        (MIXES, (((0, 1),), 1, 20), "mixed_T32_C4_P4"),  # a whole prompt
        # Where blocks are known, it is the last of them that counts.
        (MIXES, (((0, 2),), 2, 20, 10), "mixed_T32_C9_P16"),
        (MIXES, (((0, 2),), 2, 20), "mixed_T32_C4_P4"),
        (MIXES, ((), 2, 20, 10), "decode_B2_P16"),
        (WHOLE, ((), 2, 200, 4), "decode_B2_P4"),
        # Of 10 decodes 2 count as chunks, of 3 blocks each, and 8 have 16.
        (MIXES, ((), 10, 330), "mixed_T32_C9_P16"),
    ],
    ids=str,
)
def test_the_smallest_listed_shape_is_found(buckets, load, expected):
    assert str(buckets.load_shape(StepLoad(*load), 16)) == expected


@pytest.mark.parametrize(
    ("buckets", "load", "message"),
    [
        (WHOLE, (((0, 65),), 0, 0), "prefill: expected at most .*tokens=64.* got"),
        (WHOLE, (((0, 1),) * 9, 0, 0), "prefill: .*, got .*tokens=9, rows=9"),
        (WHOLE, ((), 9, 9), "decode: expected at most .*rows=8.* got .*rows=9"),
        (MIXES, (((0, 65),), 0, 0), "mixed: .*tokens=64, .* got .*tokens=65"),
        (MIXES, (((0, 2),) * 13, 0, 0), "mixed: .*, got .*tokens=26, rows=13"),
        (MIXES, (((150, 2),), 0, 0), "mixed: .*, got .*context=10"),
        # 9 decodes have 144.1 tokens each; the one that counts as a chunk has 145 of
        # them, in 10 blocks.
        (MIXES, ((), 9, 9 * 144 + 1), "mixed: .*, got .*tokens=9, rows=9, context=10"),
        # The last token of a prompt is a chunk where no row is left for a decode.
        (MIXES, (((150, 1),), 8, 8), "mixed: .*, got .*context=10"),
        (
            dataclasses.replace(NOTHING, prefill=PREFILLS),
            ((), 1, 9),
            "decode: .* most none, got",
        ),
    ],
    ids=str,
)
def test_a_load_larger_than_all_shapes_is_refused(buckets, load, message):
    with pytest.raises(ValueError, match=message):
        buckets.load_shape(StepLoad(*load), 16)


@pytest.mark.parametrize(
    ("load", "mixed", "expected"),
    [
        ((((0, 20), (0, 13)), 0, 0), False, StepShape.prefill(33, 2)),
        ((((0, 20), (0, 13)), 0, 0), True, StepShape.mixed(33, 2, 3, 0, 0)),
        ((((30, 3),), 0, 0), True, StepShape.mixed(3, 1, 3, 0, 0)),
        # 3 decodes of 30 tokens have half a block each to spare: 52.5 tokens.
        (((), 3, 30), False, StepShape.decode(3, 4)),
        (((), 3, 30), True, StepShape.decode(3, 4)),
        (((), 3, 30, 9), True, StepShape.decode(3, 9)),
        ((((0, 20),), 3, 30), False, StepShape.mixed(23, 4, 2, 3, 4)),
    ],
    ids=str,
)
def test_an_exact_shape_holds_a_load_and_no_more(load, mixed, expected):
    assert exact_shape(StepLoad(*load), 16, mixed=mixed) == expected
