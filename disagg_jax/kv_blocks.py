"""KV block accounting of one instance: who holds which blocks, and what is free."""

from __future__ import annotations

import heapq

from disagg_jax.deployment import KVMemory


class KVBlocks:
    """The block tables of one instance's pool.

    It raises on anything impossible (more blocks than are free, a release of what is
    not held) and repairs nothing: such a call is a bug in whoever made it.
    """

    def __init__(self, memory: KVMemory):
        self.memory = memory
        # A heap: the lowest free blocks are used first, which keeps the used part of
        # the pool short. A decode step reads the pool up to its last used block.
        self._free = list(range(memory.num_blocks))
        self._tables: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def held_by(self) -> dict[int, int]:
        """Blocks held, by request id."""
        return {owner: len(table) for owner, table in self._tables.items()}

    def held(self, owner: int) -> int:
        """Blocks that request `owner` holds."""
        return len(self._tables.get(owner, ()))

    def missing(self, owner: int, tokens: int) -> int:
        """Blocks that `owner` must still get before it can hold `tokens` tokens."""
        return max(0, self.memory.blocks_for(tokens) - self.held(owner))

    def table(self, owner: int) -> tuple[int, ...]:
        """The blocks of `owner`, in the order of its tokens."""
        return tuple(self._tables[owner])

    def extend(self, owner: int, tokens: int) -> None:
        """Gives `owner` the blocks it is missing to hold `tokens` tokens."""
        missing = self.missing(owner, tokens)
        if missing > self.free:
            raise RuntimeError(
                f"request {owner} needs {missing} more KV blocks for {tokens} tokens, "
                f"but only {self.free} of {self.memory.num_blocks} are free"
            )
        table = self._tables.setdefault(owner, [])
        for _ in range(missing):
            table.append(heapq.heappop(self._free))

    def release(self, owner: int) -> None:
        """Takes all blocks of `owner` back."""
        if owner not in self._tables:
            raise RuntimeError(f"request {owner} holds no KV blocks to release")
        for block in self._tables.pop(owner):
            heapq.heappush(self._free, block)
