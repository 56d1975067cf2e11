"""Requests that decode together, advanced as one."""

from __future__ import annotations

import collections
import heapq
import typing
from collections.abc import Iterable, Sequence

from disagg_jax.kv_blocks import KVBlocks

if typing.TYPE_CHECKING:  # `state` itself needs this module
    from disagg_jax.state import RequestState


class DecodeBatch:
    """Requests that each compute one token in every iteration.

    What a member knows, and when its tokens came, is where it stood when it joined plus
    the iterations since. So an iteration costs O(1), not O(members), and joining or
    leaving O(log members); only where a member crosses into another block is it looked
    at by itself.

    Attributes:
      members: by request id, in queue order.
      iteration: iterations completed.
      context: cached tokens of all members together.
      stepping: whether it is in a step. Only an idle batch takes members in.
    """

    def __init__(self, blocks: KVBlocks):
        self.members: collections.OrderedDict[int, RequestState] = (
            collections.OrderedDict()
        )
        self.iteration = 0
        self.context = 0
        self.stepping = False
        self._blocks = blocks
        self._block_tokens = blocks.memory.block_tokens
        self._ends_s: list[float] = []  # of every iteration
        # Those that have all their tokens after an iteration, and such iterations in a
        # heap, where some may be outdated.
        self._ending: dict[int, dict[int, RequestState]] = {}
        self._end_iterations: list[int] = []
        # Those in phase p cross into another block when p + iteration is a multiple of
        # the block size. Those that hold all blocks they can need are in no phase.
        self._phases: dict[int, dict[int, None]] = {}
        self._growing = 0  # members in a phase
        self._prepaid: set[int] = set()  # hold the block of their next token already
        self._charged = False  # the blocks of the next iteration are reserved
        self._fresh: dict[int, RequestState] = {}  # were not in a step yet

    def __len__(self) -> int:
        return len(self.members)

    # -- members --------------------------------------------------------------------

    def join(self, state: RequestState) -> None:
        """Takes in a request that lacks the KV of its newest token only."""
        self._fresh[state.id] = state
        self._add(state)
        held = self._blocks.held(state.id)
        if state.grows and held > self._blocks.memory.blocks_for(state.context):
            self._prepaid.add(state.id)

    def _add(self, state: RequestState, *, front: bool = False) -> None:
        context, id = state.context, state.id
        state.batch, state.joined = self, self.iteration
        state.phase = (context - self.iteration) % self._block_tokens
        self.members[id] = state
        if front:
            self.members.move_to_end(id, last=False)
        state.grows = self._blocks.held(id) * self._block_tokens < state.limit
        if state.grows:
            self._growing += 1
            self._phases.setdefault(state.phase, {})[id] = None
        left = state.limit + 1 - state.settled_known
        state.last = last = self.iteration + left
        if last not in self._ending:
            self._ending[last] = {}
            heapq.heappush(self._end_iterations, last)
        self._ending[last][id] = state
        self.context += context

    def leave(self, state: RequestState) -> None:
        """Lets a member go, with all its tokens stamped."""
        self.context -= state.context
        self.settle(state)
        state.batch, id = None, state.id
        del self.members[id]
        if state.grows:
            self._growing -= 1
            del self._phases[state.phase][id]
        del self._ending[state.last][id]
        self._prepaid.discard(id)
        self._fresh.pop(id, None)

    def settle(self, state: RequestState) -> None:
        """Writes down what a member went through since it joined."""
        passed = self.iteration - state.joined
        if state.active:
            state.timeline.token_s += self._ends_s[state.joined : self.iteration]
        state.settled_known += passed
        state.settled_context += passed
        state.joined = self.iteration

    def shift(
        self, states: Iterable[RequestState], to: DecodeBatch, *, front: bool = False
    ) -> None:
        """Lets members go over to another batch, each to its end or its front."""
        for state in states:
            fresh, prepaid = state.id in self._fresh, state.id in self._prepaid
            self.leave(state)
            to._add(state, front=front)
            if fresh:
                to._fresh[state.id] = state
            if prepaid:
                to._prepaid.add(state.id)

    def absorb(self, other: DecodeBatch) -> tuple[DecodeBatch, DecodeBatch]:
        """Brings the members of `other` behind its own: (batch of all, the empty one).

        Only those of the smaller batch are looked at.
        """
        if len(self.members) >= len(other.members):
            other.shift(list(other.members.values()), self)
            return self, other
        self.shift(reversed(list(self.members.values())), other, front=True)
        return other, self

    def take_fresh(self) -> Iterable[RequestState]:
        """The members that are new since this was last asked."""
        fresh, self._fresh = self._fresh, {}
        return fresh.values()

    @property
    def finished(self) -> list[RequestState]:
        """Members that have all their tokens, in order of arrival."""
        states = self._ending.get(self.iteration, {}).values()
        return sorted(states, key=lambda state: state.order)

    def _next_end(self) -> int:
        """The iteration after which the first member has all its tokens."""
        while not self._ending[self._end_iterations[0]]:
            del self._ending[heapq.heappop(self._end_iterations)]
        return self._end_iterations[0]

    # -- iterations -----------------------------------------------------------------

    def start(self) -> None:
        """The first iteration of a step begins."""
        self.stepping = True
        self.charge()

    def charge(self) -> None:
        """Reserves the blocks of the iteration that begins."""
        self._charge(self.iteration)
        self._charged = True

    def _charge(self, iteration: int) -> None:
        owners = self._phases.get(-iteration % self._block_tokens)
        if owners:
            self._blocks.add_to_each(owners.keys() - self._prepaid)
        self._prepaid.clear()

    def advance(self, ends_s: Sequence[float]) -> None:
        """Iterations are over, at `ends_s`."""
        for iteration in range(self.begun, self.iteration + len(ends_s)):
            self._charge(iteration)
        self.iteration += len(ends_s)
        self._charged = False
        self._ends_s += ends_s
        self.context += len(ends_s) * len(self.members)

    @property
    def begun(self) -> int:
        """Iterations completed or going on."""
        return self.iteration + self._charged

    def missing(self, iterations: int = 1) -> int:
        """Blocks that the next iterations, not begun yet, must still get.

        Of no more iterations than any member has left.
        """
        size, begun = self._block_tokens, self.begun
        cycles, rest = divmod(iterations, size)
        blocks = cycles * self._growing - len(self._prepaid)
        for iteration in range(begun, begun + rest):
            blocks += len(self._phases.get(-iteration % size, ()))
        return blocks

    def fits(self, iterations: int, free: int) -> bool:
        """Whether the next iterations, not begun yet, can run on `free` blocks."""
        at_most = (iterations // self._block_tokens + 1) * self._growing
        return at_most <= free or self.missing(iterations) <= free

    def lasting(self, free: int) -> int:
        """Iterations until a member is finished or `free` blocks are used up."""
        iterations = self._next_end() - self.iteration
        if self.fits(iterations, free):
            return iterations
        low, high = 0, iterations  # `low` iterations can run, `high` cannot
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits(middle, free):
                low = middle
            else:
                high = middle
        return low
