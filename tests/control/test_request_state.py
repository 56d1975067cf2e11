"""A batch advanced as one, against members that are counted one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.control.request_state import DecodeBatch, RequestState
from disagg_jax.deployment import KVMemory
from disagg_jax.request import Timeline
from tests.serving import make_request

BLOCK = 4  # tokens


def member(id: int, context: int, left: int, blocks: KVBlocks, *, ahead: int):
    """A request with `context` cached tokens and `left` more tokens to generate.

    `ahead`: tokens for which it holds blocks already: 1 if it was just transferred, all
    that are left if its memory was reserved.
    """
    request = make_request(id, prompt=context, out=left + 1)
    state = RequestState(request, id, Timeline(request=request))
    state.set_tokens(context + 1, context)
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
        max(0, memory.blocks_for(s.cached_tokens + iterations) - blocks.held(s.id))
        for s in states
    )


@given(MEMBERS, st.integers(1, 30), st.integers(0, 30))
def test_blocks_of_the_next_iterations(members, iterations, free):
    batch, states, blocks = make_batch(members, free)
    first_end = min(left for _, left, _ in members)
    iterations = min(iterations, first_end)
    assert batch.missing(iterations) == needed(states, blocks, iterations)
    lasting = [n for n in range(1, first_end + 1) if needed(states, blocks, n) <= free]
    if lasting:
        assert batch.iterations_until_change(free) == max(lasting)


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
        assert (state.cached_tokens, state.num_tokens) == (
            context + done,
            context + 1 + done,
        )
        assert blocks.held(state.id) >= blocks.memory.blocks_for(state.cached_tokens)
    assert batch.context == sum(s.cached_tokens for s in batch.members)
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
    assert whole.context == sum(s.cached_tokens for s in whole.members)


@given(MEMBERS, st.data())
def test_any_part_can_step_alone(members, data):
    """Members know what they went through, hold what they need, and keep their order.

    Whether or not somebody looked ahead before.
    """
    ready, states, blocks = make_batch(members)
    spare, queue = DecodeBatch(blocks), list(states)
    stamps = {s.id: [-1.0] for s in states}
    held = dict(blocks.held_by)
    for turn in range(data.draw(st.integers(1, 8))):
        if not queue:
            break
        chosen = data.draw(st.lists(st.sampled_from(queue), min_size=1, unique=True))
        chosen.sort(key=queue.index)
        if data.draw(st.booleans()):
            ready.missing()
        batch = ready.split(chosen, spare)
        other = spare if batch is ready else ready
        assert batch.members == chosen
        for s in chosen:
            held[s.id] = max(held[s.id], blocks.memory.blocks_for(s.cached_tokens + 1))
        batch.start()
        assert blocks.held_by == held
        batch.advance((float(turn),))
        batch.stepping = False
        for s in chosen:
            stamps[s.id].append(float(turn))
        ended = [s for s in chosen if len(stamps[s.id]) == s.request.max_tokens]
        assert batch.finished == sorted(ended, key=lambda s: s.order)
        for s in ended:
            batch.leave(s)
        queue = [s for s in queue if s not in chosen]
        queue += [s for s in chosen if s not in ended]
        ready, spare = other.absorb(batch)
        assert ready.members == queue
        assert ready.context == sum(s.cached_tokens for s in queue)
    for s in list(queue):
        ready.leave(s)
    for s, (context, _, _) in zip(states, members, strict=True):
        assert s.timeline.token_s == stamps[s.id]
        assert s.cached_tokens == context + len(stamps[s.id]) - 1


def test_only_members_can_step():
    ready, (state, _), blocks = make_batch([(3, 9, 0), (3, 9, 0)])
    ready.leave(state)
    with pytest.raises(RuntimeError, match="1 to decode are not ready"):
        ready.split([state], DecodeBatch(blocks))
