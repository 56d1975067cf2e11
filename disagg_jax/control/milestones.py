"""Milestones: when members of a batch need a block or finish, known ahead."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from disagg_jax.control.block_pool import KVBlocks


class Milestones:
    """The iterations of a batch in which its members need a block, or finish.

    Attributes:
      growing: number of members that can need another block.
      ending: by iteration, the ids of the members that finish with it.
    """

    def __init__(self, blocks: KVBlocks):
        self.growing = 0
        self.ending: dict[int, set[int]] = {}
        self._end_iterations: list[int] = []  # a heap; some may be outdated
        self._blocks = blocks
        self._block_tokens = blocks.memory.block_tokens
        # Members in phase p cross into another block when p + iteration is a multiple
        # of the block size. Members that hold all blocks they can need have no phase.
        self._phases: dict[int, dict[int, None]] = {}
        self._prepaid: set[int] = set()  # hold the block of their next token already

    def add(self, id: int, base: int, max_cached_tokens: int, context: int) -> None:
        """Add a request.

        Args:
          base: its cached tokens less the iterations of the batch.
          max_cached_tokens: tokens whose KV it can ever need.
          context: its tokens that have a block.
        """
        size = self._block_tokens
        held = self._blocks.held(id)
        if held * size < max_cached_tokens:
            self.growing += 1
            self._phases.setdefault(base % size, {})[id] = None
            if held > -(-context // size):
                self._prepaid.add(id)
        last = max_cached_tokens - base
        if last not in self.ending:
            self.ending[last] = set()
            heapq.heappush(self._end_iterations, last)
        self.ending[last].add(id)

    def remove(self, id: int, base: int, max_cached_tokens: int) -> None:
        """Remove a request that was added with these numbers."""
        phase = self._phases.get(base % self._block_tokens, {})
        if id in phase:
            self.growing -= 1
            del phase[id]
            self._prepaid.discard(id)
        self.ending[max_cached_tokens - base].remove(id)

    def reserve(self, begun: int, end: int) -> None:
        """Reserve the blocks of the iterations from `begun` up to `end`."""
        size, phases = self._block_tokens, self._phases
        for iteration in range(begun, end):
            owners: Collection[int] = phases.get(-iteration % size, ())
            if self._prepaid:  # for the first of the iterations
                owners = [o for o in owners if o not in self._prepaid]
                self._prepaid.clear()
            if owners:
                self._blocks.add_to_each(owners)

    def missing(self, begun: int, iterations: int) -> int:
        """Count the blocks that `iterations` iterations from `begun` on need."""
        size = self._block_tokens
        cycles, rest = divmod(iterations, size)
        blocks = cycles * self.growing - len(self._prepaid)
        for iteration in range(begun, begun + rest):
            blocks += len(self._phases.get(-iteration % size, ()))
        return blocks

    def next_end(self) -> int:
        """Return the iteration with which the first member finishes."""
        while not self.ending[self._end_iterations[0]]:
            del self.ending[heapq.heappop(self._end_iterations)]
        return self._end_iterations[0]
