"""A batch advanced as one, against members that are counted one by one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_jax.decode_batch import DecodeBatch
from disagg_jax.deployment import KVMemory
from disagg_jax.kv_blocks import KVBlocks
from disagg_jax.request import Timeline
from disagg_jax.state import RequestState
from tests.serving import make_request

BLOCK = 4  # tokens


def member(id: int, context: int, left: int, blocks: KVBlocks, *, ahead: int):
    """A request with `context` cached tokens and `left` more tokens to generate.

    `ahead`: tokens for which it holds blocks already: 1 if it was just transferred, all
    that are left if its memory was reserved.
    """
    request = make_request(id, prompt=context, out=left + 1)
    state = RequestState(request, id, Timeline(request=request), context + 1, context)
    state.timeline.token_s.append(-1.0)
    blocks.extend(id, context + ahead)
    return state


MEMBERS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(
        lambda sizes: st.tuples(*map(st.just, sizes), st.sampled_from([0, 1, sizes[1]]))
    ),
    min_size=1,
    max_size=6,
)


def make_batch(members, free=10_000):
    held = sum(-(-(context + ahead) // BLOCK) for context, _, ahead in members)
    memory = KVMemory(num_blocks=held + free, block_tokens=BLOCK, max_context=100)
    blocks = KVBlocks(memory)
    batch = DecodeBatch(blocks)
    states = [
        member(i, context, left, blocks, ahead=ahead)
        for i, (context, left, ahead) in enumerate(members)
    ]
    for state in states:
        batch.join(state)
    return batch, states, blocks


def needed(states, blocks, iterations: int) -> int:
    """Blocks for so many more tokens of each, counted one by one."""
    memory = blocks.memory
    return sum(
        max(0, memory.blocks_for(s.context + iterations) - blocks.held(s.id))
        for s in states
    )


@settings(max_examples=300)
@given(MEMBERS, st.integers(1, 30), st.integers(0, 30))
def test_blocks_of_the_next_iterations(members, iterations, free):
    batch, states, blocks = make_batch(members, free)
    first_end = min(left for _, left, _ in members)
    iterations = min(iterations, first_end)
    assert batch.missing(iterations) == needed(states, blocks, iterations)
    lasting = [n for n in range(1, first_end + 1) if needed(states, blocks, n) <= free]
    if lasting:
        assert batch.lasting(free) == max(lasting)


@settings(max_examples=300)
@given(MEMBERS, st.data())
def test_members_know_what_they_went_through(first, data):
    batch, states, blocks = make_batch(first)
    now_s = 0.0
    passed = dict.fromkeys((s.id for s in states), 0)
    for _ in range(data.draw(st.integers(0, 6))):
        if not batch.members:
            break
        batch.start()
        batch.advance((now_s,))
        batch.stepping = False
        now_s += 1.0
        for state in batch.members:
            passed[state.id] += 1
        for state in batch.finished:
            batch.leave(state)
            assert passed[state.id] == state.request.max_tokens - 1
    for state, (context, _, _) in zip(states, first, strict=True):
        done = passed[state.id]
        assert (state.context, state.known) == (context + done, context + 1 + done)
        assert blocks.held(state.id) >= blocks.memory.blocks_for(state.context)
    assert batch.context == sum(s.context for s in batch.members)
    for state in list(batch.members):
        batch.leave(state)
    for state in states:
        times_s = [-1.0, *map(float, range(passed[state.id]))]
        assert state.timeline.token_s == times_s


@given(st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_absorbed_members_come_behind_whichever_batch_is_larger(a, b, step_first):
    _, states, blocks = make_batch([(3, 9, 0)] * (a + b) or [(3, 9, 0)])
    front, back = DecodeBatch(blocks), DecodeBatch(blocks)
    for state in states[: a + b]:
        state.batch.leave(state)
        (front if state.id < a else back).join(state)
    if step_first and back.members:
        back.start()
        back.advance((1.0, 2.0))
        back.stepping = False
    whole, empty = front.absorb(back)
    assert [s.id for s in whole.members] == list(range(a + b))
    assert not empty.members and empty.context == 0
    assert whole.context == sum(s.context for s in whole.members)
