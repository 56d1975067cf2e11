"""Which program a step takes: the engine's own choice, up to a guess of the front."""

import functools
import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from disagg_jax.calibration.profile_keys import program_of
from disagg_jax.deployment import KVMemory
from disagg_jax.engine.batch import split_decodes
from disagg_jax.engine.buckets import Buckets
from disagg_jax.engine.executor import load_slices
from disagg_jax.request import Request
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.sim.programs import Program, ProgramList
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
def lists(policy, memory: KVMemory) -> tuple[Buckets, ProgramList]:
    buckets = Buckets.for_limits(policy.limits, memory)
    programs = tuple(program_of(shape) for shape in buckets.step_shapes)
    return buckets, ProgramList(programs, memory.block_tokens)


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


def fronts(blocks: int, decodes: int, pool: int) -> tuple[int, int]:
    """The shortest and the longest guess for decodes that have so many blocks.

    Of `decodes` last blocks, each has room for 0 to size - 1 tokens. Half of that is
    assumed, so the sum is off by less than decodes / 2 blocks, and rounded up.
    """
    longest = math.ceil(blocks + decodes / 2 + 1) - 1
    shortest = max(1, math.floor(blocks - decodes / 2) + 1)
    return min(pool, shortest), min(pool, longest)


def assert_is_the_engines(found, slices, buckets, memory) -> None:
    """Of prefills and chunks exactly. Of others the front is a guess, less than
    decodes / 2 + 1 blocks off, so that another is taken only where a listed size lies
    between."""
    taken = program_of(buckets.step_shape(slices))
    assert found._replace(blocks=0) == taken._replace(blocks=0)
    most = buckets.decode_rows[-1] if buckets.decode_rows else 0
    parts, decodes = split_decodes(slices, most)
    if found.kind == "prefill" or not decodes:
        assert found == taken
        return
    between = []
    blocks = sum(len(part.blocks) for part in decodes)
    for front in fronts(blocks, len(decodes), memory.num_blocks):
        if found.kind == "decode":
            other = buckets.decode_shape(len(decodes), front)
        else:
            other = buckets.mixed_shape(
                tokens=sum(part.count for part in slices),
                rows=len(slices),
                context=sum(len(part.blocks) for part in parts),
                blocks=front,
            )
        between.append(other.blocks)
    assert between[0] <= found.blocks <= between[1]


@pytest.mark.parametrize("policy", POLICIES, ids=POLICIES.get)
@given(memory=st.sampled_from(MEMORIES), data=st.data())
def test_the_program_is_the_one_that_the_engine_takes(policy, memory, data):
    buckets, programs = lists(policy, memory)
    chunks, contexts = data.draw(loads(policy.limits, memory))
    found = programs.find(StepLoad(chunks, len(contexts), sum(contexts)))
    slices = packed(chunks, contexts, memory)
    assert_is_the_engines(found, slices, buckets, memory)


@pytest.mark.parametrize("policy", POLICIES, ids=POLICIES.get)
@given(memory=st.sampled_from(MEMORIES), data=st.data())
def test_the_program_is_that_of_the_slices_for_timing(policy, memory, data):
    """All but the front: `load_slices` lays chunks before decodes, so that it is longer
    by their blocks, which no load tells. There it is compared to the decodes' own."""
    buckets, programs = lists(policy, memory)
    chunks, contexts = data.draw(loads(policy.limits, memory))
    n = len(contexts)
    load = StepLoad(chunks, n, n * (sum(contexts) // n) if n else 0)
    slices = load_slices(load, memory)
    assert_is_the_engines(programs.find(load), slices, buckets, memory)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.sampled_from([1, 4, 16, 17]),
)
def test_the_front_is_guessed_to_half_a_block_for_each_request(contexts, size):
    programs = ProgramList((Program("decode", 64, 64, 0, 64, 10**6),), size)
    blocks = sum(-(-context // size) for context in contexts)
    decodes = len(contexts)
    guess = programs.front(decodes, sum(contexts))
    assert -decodes / 2 < guess - blocks < decodes / 2 + 1
    low, high = fronts(blocks, decodes, 10**6)
    assert low <= guess <= high


@given(st.integers(1, 64), st.integers(1, 500), st.sampled_from([1, 4, 16, 17]))
def test_the_context_of_a_front_is_the_most_it_holds(decodes, blocks, size):
    programs = ProgramList((Program("decode", 64, 64, 0, 64, 10**6),), size)
    context = programs.context(decodes, blocks)
    assert programs.front(decodes, context) <= blocks
    assert programs.front(decodes, context + 1) > blocks


# ---- by example ----------------------------------------------------------------------

DECODES = [
    Program("decode", rows, rows, 0, rows, blocks)
    for rows in (1, 2, 8)
    for blocks in (4, 16)
]
MIXED = [
    Program("mixed", tokens, 12, context, 8, blocks)
    for tokens in (32, 64)
    for context, blocks in ((4, 4), (9, 16))
]
PREFILLS = [Program("prefill", 32, 4), Program("prefill", 64, 8)]
WHOLE = ProgramList((*PREFILLS, *DECODES), 16)
MIXES = ProgramList((*MIXED, *DECODES), 16)


@pytest.mark.parametrize(
    ("programs", "load", "expected"),
    [
        (WHOLE, (((0, 30),), 0, 0), "prefill_T32_R4"),
        (WHOLE, (((0, 20), (0, 13)), 0, 0), "prefill_T64_R8"),
        (WHOLE, (((0, 1),) * 5, 0, 0), "prefill_T64_R8"),  # for its rows
        # Half of a last block is 7.5 tokens: 56.5 of 64 are left for one request.
        (WHOLE, ((), 1, 56), "decode_T1_R1_B1_P4"),
        (WHOLE, ((), 1, 57), "decode_T1_R1_B1_P16"),
        (WHOLE, ((), 3, 41), "decode_T8_R8_B8_P4"),  # 64 - 3 x 7.5 = 41.5
        (WHOLE, ((), 3, 42), "decode_T8_R8_B8_P16"),
        # All blocks full: the guess is more than there are. The rows stay few.
        (WHOLE, ((), 1, 256), "decode_T1_R1_B1_P16"),
        (WHOLE, ((), 2, 256), "decode_T2_R2_B2_P16"),
        (MIXES, (((0, 2),), 2, 256), "mixed_T32_R12_C9_B8_P16"),
        (MIXES, (((0, 30),), 0, 0), "mixed_T32_R12_C4_B8_P4"),
        (MIXES, (((0, 30),), 3, 30), "mixed_T64_R12_C4_B8_P4"),
        (MIXES, (((0, 20),), 8, 80), "mixed_T32_R12_C9_B8_P16"),  # 80 + 60 tokens
        (MIXES, (((100, 20),), 0, 0), "mixed_T32_R12_C9_B8_P16"),  # 8 blocks
        # The last token of a prompt is like a decode, where a row is left for it.
        (MIXES, (((20, 1),), 1, 20), "decode_T2_R2_B2_P4"),
        # Two with 28 + 21 and with 29 + 21 tokens; 64 - 2 x 7.5 = 49 fit.
        (MIXES, (((20, 1),), 1, 28), "decode_T2_R2_B2_P4"),
        (MIXES, (((20, 1),), 1, 29), "decode_T2_R2_B2_P16"),
        (MIXES, (((20, 1),), 8, 8), "mixed_T32_R12_C9_B8_P16"),
        (MIXES, (((0, 1),), 1, 20), "mixed_T32_R12_C4_B8_P4"),  # a whole prompt
        # Where blocks are known, it is the last of them that counts.
        (MIXES, (((0, 2),), 2, 20, 10), "mixed_T32_R12_C9_B8_P16"),
        (MIXES, (((0, 2),), 2, 20), "mixed_T32_R12_C4_B8_P4"),
        (MIXES, ((), 2, 20, 10), "decode_T2_R2_B2_P16"),
        (WHOLE, ((), 2, 200, 4), "decode_T2_R2_B2_P4"),
        # Of 10 decodes 2 count as chunks, of 3 blocks each, and 8 have 16.
        (MIXES, ((), 10, 330), "mixed_T32_R12_C9_B8_P16"),
    ],
    ids=str,
)
def test_the_smallest_listed_program_is_found(programs, load, expected):
    assert str(programs.find(StepLoad(*load))) == expected


@pytest.mark.parametrize(
    ("programs", "load", "message"),
    [
        (WHOLE, (((0, 65),), 0, 0), "prefill: expected at most prefill_T64_R8, got"),
        (WHOLE, (((0, 1),) * 9, 0, 0), "prefill: .*, got prefill_T9_R9"),
        (WHOLE, ((), 9, 9), "decode: expected at most decode_T8_R8_B8_P16, got"),
        (MIXES, (((0, 65),), 0, 0), "mixed: .* mixed_T64_R12_C9_B8_P16, got mixed_T65"),
        (MIXES, (((0, 2),) * 13, 0, 0), "mixed: .*, got mixed_T26_R13"),
        (MIXES, (((150, 2),), 0, 0), "mixed: .*, got mixed_T2_R1_C10"),
        # 9 decodes have 144.1 tokens each; the one that counts as a chunk has 145 of
        # them, in 10 blocks.
        (MIXES, ((), 9, 9 * 144 + 1), "mixed: .*, got mixed_T9_R9_C10_B8_P16"),
        # A last token with no row left for it among the decodes has its 10 blocks.
        (MIXES, (((150, 1),), 8, 8), "mixed: .*, got mixed_T9_R9_C10_B8_P5"),
        (ProgramList(tuple(PREFILLS), 16), ((), 1, 9), "decode: .* most none, got"),
    ],
    ids=str,
)
def test_what_is_larger_than_all_programs_is_refused(programs, load, message):
    with pytest.raises(ValueError, match=message):
        programs.find(StepLoad(*load))


def test_a_list_without_sense_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of .*, got .*'chunk'"):
        ProgramList((Program("chunk", 1, 1),), 16)
    with pytest.raises(ValueError, match="block_tokens: expected >= 1, got 0"):
        ProgramList((), 0)
