"""KV block accounting of one instance: who holds which blocks, and what is free."""

from __future__ import annotations

from collections.abc import Collection

from disagg_jax.deployment import KVMemory


class KVBlocks:
    """The block tables of one instance's pool.

    Blocks are counted at once and get an identity when a table is first read, since a
    simulation only counts them. So equal reads in equal order give equal blocks. An
    impossible call (more blocks than are free, a release of blocks not held) raises and
    repairs nothing: it is a bug of the caller.
    """

    def __init__(self, memory: KVMemory):
        self.memory = memory
        self.free = memory.num_blocks  # blocks that no request holds
        self._held: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}
        self._returned: list[int] = []  # the last one is used again first
        self._untouched = 0  # the first block that was never in a table

    @property
    def held_by(self) -> dict[int, int]:
        """Number of blocks held, by request id."""
        return dict(self._held)

    def held(self, owner: int) -> int:
        """Count the blocks that request `owner` holds."""
        return self._held.get(owner, 0)

    def missing(self, owner: int, tokens: int) -> int:
        """Count the blocks that `owner` must still get to hold `tokens` tokens."""
        return max(0, self.memory.blocks_for(tokens) - self.held(owner))

    def table(self, owner: int) -> tuple[int, ...]:
        """Return the blocks of `owner`, in the order of its tokens."""
        table = self._tables.setdefault(owner, [])
        for _ in range(self._held[owner] - len(table)):
            table.append(self._next())
        return tuple(table)

    def extend(self, owner: int, tokens: int) -> None:
        """Give `owner` the blocks it is missing to hold `tokens` tokens."""
        self.add(owner, self.missing(owner, tokens))

    def add(self, owner: int, count: int) -> None:
        """Give `owner` `count` more blocks."""
        if count > self.free:
            raise RuntimeError(
                f"request {owner} needs {count} more KV blocks, but only {self.free} "
                f"of {self.memory.num_blocks} are free"
            )
        self.free -= count
        self._held[owner] = self._held.get(owner, 0) + count

    def add_to_each(self, owners: Collection[int]) -> None:
        """Give each of `owners`, all of which hold blocks, one block more."""
        if len(owners) > self.free:
            raise RuntimeError(
                f"{len(owners)} requests need a KV block more each, but only "
                f"{self.free} of {self.memory.num_blocks} are free"
            )
        self.free -= len(owners)
        for owner in owners:
            self._held[owner] += 1

    def release(self, owner: int) -> None:
        """Take all blocks of `owner` back."""
        if owner not in self._held:
            raise RuntimeError(f"request {owner} holds no KV blocks to release")
        self.free += self._held.pop(owner)
        self._returned += self._tables.pop(owner, ())

    def _next(self) -> int:
        if self._returned:
            return self._returned.pop()
        self._untouched += 1
        return self._untouched - 1
