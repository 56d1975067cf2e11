"""KV blocks: none lost, none owned twice, nothing repaired."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.deployment import KVMemory

OWNERS = st.integers(0, 3)  # 0 included: a request id like any other


def pool(num_blocks: int = 4) -> KVBlocks:
    return KVBlocks(KVMemory(num_blocks=num_blocks, block_tokens=4, max_context=100))


class BlocksMachine(RuleBasedStateMachine):
    """Random extends and releases beside a model that only counts tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = pool(6)
        self.tokens = {}  # owner -> most tokens it asked for

    def needs(self, owner: int, tokens: int) -> int:
        return -(-max(tokens, self.tokens.get(owner, 0)) // 4)

    @rule(owner=OWNERS, tokens=st.integers(1, 30))
    def extend(self, owner: int, tokens: int):
        before = self.blocks.table(owner) if owner in self.tokens else ()
        others = sum(self.needs(o, 0) for o in self.tokens if o != owner)
        if others + self.needs(owner, tokens) > 6:
            with pytest.raises(RuntimeError, match=f"request {owner} needs"):
                self.blocks.extend(owner, tokens)
            return
        self.blocks.extend(owner, tokens)
        self.tokens[owner] = max(tokens, self.tokens.get(owner, 0))
        # Blocks held already keep their place: their KV stays valid.
        assert self.blocks.table(owner)[: len(before)] == before

    @rule(owner=OWNERS)
    def release(self, owner: int):
        if owner in self.tokens:
            self.blocks.release(owner)
            del self.tokens[owner]
        else:
            with pytest.raises(RuntimeError, match=f"request {owner} holds no KV"):
                self.blocks.release(owner)

    @precondition(lambda self: self.tokens)
    @rule(tokens=st.integers(0, 30))
    def missing(self, tokens: int):
        owner = min(self.tokens)
        held = self.needs(owner, 0)
        assert self.blocks.missing(owner, tokens) == max(0, -(-tokens // 4) - held)

    @invariant()
    def no_block_is_lost_or_owned_twice(self):
        owned = [block for o in self.tokens for block in self.blocks.table(o)]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(6))
        assert len(owned) + self.blocks.free == 6
        assert self.blocks.held_by == {o: self.needs(o, 0) for o in self.tokens}


TestBlocks = BlocksMachine.TestCase


def test_over_extending_changes_nothing():
    blocks = pool(4)
    blocks.extend(1, 9)  # 3 blocks
    with pytest.raises(RuntimeError, match="needs 2 more KV blocks, but only 1 of 4"):
        blocks.extend(1, 17)
    assert (blocks.free, blocks.held(1)) == (1, 3)
    with pytest.raises(RuntimeError):
        blocks.extend(2, 5)
    assert blocks.held_by == {1: 3}


def test_a_block_more_for_each_or_for_none():
    blocks = pool(4)
    blocks.extend(0, 4)
    blocks.extend(1, 4)
    blocks.add_to_each({0, 1})
    assert (blocks.free, blocks.held_by) == (0, {0: 2, 1: 2})
    assert sorted(blocks.table(0) + blocks.table(1)) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="1 requests need a KV block more .* only 0"):
        blocks.add_to_each({1})
    assert blocks.held_by == {0: 2, 1: 2}


def test_double_release_raises():
    blocks = pool()
    blocks.extend(0, 1)
    blocks.release(0)
    with pytest.raises(RuntimeError, match="request 0 holds no KV blocks to release"):
        blocks.release(0)
    assert blocks.free == 4


def test_blocks_that_were_in_no_table_yet_come_back_too():
    blocks = pool()
    blocks.extend(0, 4)
    assert blocks.table(0) == (0,)
    blocks.extend(0, 12)
    blocks.extend(1, 4)
    assert blocks.free == 0
    blocks.release(0)
    assert blocks.free == 3
    blocks.release(1)
    assert blocks.free == 4
    blocks.extend(2, 16)
    assert blocks.table(2) == (0, 1, 2, 3)


def test_a_returned_block_is_used_again_before_a_new_one():
    blocks = pool()
    blocks.extend(0, 12)
    assert blocks.table(0) == (0, 1, 2)
    blocks.release(0)
    blocks.extend(1, 4)
    assert blocks.table(1) == (2,)
    blocks.extend(2, 12)
    assert blocks.table(2) == (1, 0, 3)


def test_a_table_that_grows_keeps_its_blocks_and_takes_the_lowest():
    blocks = pool()
    for owner in range(3):
        blocks.extend(owner, 4)
        assert blocks.table(owner) == (owner,)
    blocks.release(0)
    blocks.extend(2, 5)
    assert blocks.table(2) == (2, 0)


def test_the_lowest_free_blocks_are_used_first():
    blocks = pool()
    blocks.extend(0, 8)
    blocks.extend(1, 8)
    blocks.release(0)
    blocks.release(1)
    blocks.extend(2, 12)
    assert blocks.table(2) == (0, 1, 2)
