"""TensorRT-LLM: who is admitted, that nobody is evicted, where it is Sarathi-Serve."""

import functools

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory, Role
from disagg_jax.request import Status
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.sim.policy_check import check_run
from tests.instances import make_instance, planned
from tests.scheduling import small_steps
from tests.scheduling.small_steps import BUDGET, LOADS, SARATHI, SEQS, requests

NO_EVICT = NoEvict(max_batched_tokens=BUDGET, max_seqs=SEQS)
TENSORRT = {Role.COLOCATED: NO_EVICT}
run = functools.partial(small_steps.run, policies=TENSORRT)
schedule = functools.partial(small_steps.schedule, policies=TENSORRT)


def test_one_budget_for_decodes_and_pieces_of_prompts():
    # 5 + 3 tokens; then a decode, the other 6, and the one token that is left.
    assert schedule((5, 3), (9, 2), (2, 1), blocks=100) == [
        {0: 5, 1: 3},
        {0: 1, 1: 6, 2: 1},
        {0: 1, 1: 1, 2: 1},
    ]


def test_a_prompt_waits_for_the_blocks_of_its_longest_output():
    # Each caches 4 + 5 tokens in the end: 3 blocks. Of 5, the second must wait until
    # the first has all its 6 tokens. Sarathi-Serve begins both, and one makes room.
    lengths = (4, 6), (4, 6)
    ours = run(*lengths, blocks=5)
    assert [len(s.slices) for s in ours.steps] == [1] * 12
    assert ours.timeline(1).preemptions == 0
    theirs = run(*lengths, blocks=5, policies=SARATHI)
    assert len(theirs.steps[0].slices) == 2
    assert theirs.timeline(1).preemptions == 1
    assert schedule(*lengths, blocks=6)[0] == {0: 4, 1: 4}


def test_a_first_chunk_holds_all_blocks_and_a_later_one_no_more():
    # 20 + 4 tokens are cached in the end.
    waiting = make_instance(waiting={0: 20}, out=5, free=6)
    (chunk,) = NO_EVICT.plan(waiting).chunks
    assert (chunk.tokens, chunk.reserve) == (8, 24)
    assert planned(NO_EVICT, make_instance(waiting={0: 20}, out=5, free=5)) == ({}, [])
    begun = make_instance(partial={0: (20, 8)}, out=5, free=4)
    begun.blocks.extend(0, 24)
    assert begun.blocks.free == 0
    (chunk,) = NO_EVICT.plan(begun).chunks
    assert (chunk.tokens, chunk.reserve) == (8, 24)


def test_a_prompt_without_blocks_keeps_later_ones_waiting():
    # 1 is small enough for the free block, but came later.
    places = {"running": {9: 2}, "waiting": {0: 8, 1: 2}, "free": 1}
    assert planned(NO_EVICT, make_instance(**places)) == ({9: 1}, [])


def with_begun(**places):
    """An instance in which prompt 2 was begun, and holds the blocks for all of it."""
    instance = make_instance(partial={2: (9, 4)}, free=9, **places)
    instance.blocks.extend(2, 9)
    return instance


def test_requests_with_kv_are_bounded_and_a_begun_prompt_is_one_already():
    instance = with_begun(running={0: 2, 1: 2}, waiting={3: 1, 4: 1})
    slices = {0: 1, 1: 1, 2: 5, 3: 1}
    assert planned(NoEvict(max_batched_tokens=99, max_seqs=4), instance) == (slices, [])
    full = with_begun(running={0: 2, 1: 2, 5: 2}, waiting={3: 1})
    assert full.resident == SEQS
    assert planned(NO_EVICT, full) == ({0: 1, 1: 1, 5: 1, 2: 5}, [])


def test_decodes_alone_are_one_span():
    plan = NO_EVICT.plan(make_instance(running={0: 2, 1: 2}))
    assert plan.repeats > 1
    assert NO_EVICT.plan(make_instance(running={0: 2}, waiting={1: 2})).repeats == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_batched_tokens": 3},
            "NoEvict.max_batched_tokens: .* max_seqs .4.*got 3",
        ),
        ({"max_batched_tokens": 0}, "NoEvict.max_batched_tokens: expected >= 1, got 0"),
        ({"max_seqs": 0}, "NoEvict.max_seqs: expected >= 1, got 0"),
    ],
)
def test_impossible_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NoEvict(**{"max_batched_tokens": 8, "max_seqs": 4, **changes})


@given(LOADS, st.integers(3, 9))
def test_nobody_is_evicted(drawn, blocks):
    # 3 to 9 blocks are 12 to 36 tokens, of which a request caches up to 25.
    memory = KVMemory(num_blocks=blocks, block_tokens=4, max_context=100)
    done = check_run(TENSORRT, memory, requests(drawn))
    assert not any(timeline.preemptions for timeline in done)
    for timeline in done:
        fits = timeline.request.prompt_tokens + timeline.request.max_tokens - 1
        served = timeline.status is Status.FINISHED
        assert served == (fits <= 4 * blocks)
    theirs = check_run(SARATHI, memory, requests(drawn))
    event(f"Sarathi-Serve preempts: {any(t.preemptions for t in theirs)}")


@given(LOADS)
def test_with_memory_enough_its_steps_are_those_of_sarathi_serve(drawn):
    memory = KVMemory(num_blocks=1000, block_tokens=4, max_context=100)
    ours, theirs = (check_run(p, memory, requests(drawn)) for p in (TENSORRT, SARATHI))
    assert [t.token_s for t in ours] == [t.token_s for t in theirs]
