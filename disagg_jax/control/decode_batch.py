"""Requests that decode together, advanced as one."""

from __future__ import annotations

import heapq
import typing
from collections.abc import Collection, Iterable, Sequence

from disagg_jax.control.block_pool import KVBlocks

if typing.TYPE_CHECKING:  # `state` itself needs this module
    from disagg_jax.control.state import RequestState


class DecodeBatch:
    """Requests that each compute one token in every iteration.

    What a member knows is where it stood when it came in plus the iterations since, and
    when its tokens came is when these ended. So an iteration costs O(1), not
    O(members). Who crosses into another block, and who has all its tokens, is kept in
    `Milestones`, made when a look ahead first asks for them: where the members change
    with every iteration, looking at each of them is cheaper.

    Attributes:
      members: in queue order.
      iteration: iterations completed.
      context: cached tokens of all members together.
      stepping: whether it is in a step. Only an idle batch takes members in.
    """

    def __init__(self, blocks: KVBlocks):
        self.members: list[RequestState] = []
        self.iteration = 0
        self.context = 0
        self.stepping = False
        self._blocks = blocks
        self._block_tokens = blocks.memory.block_tokens
        self._ends_s: list[float] = []  # of every iteration
        self._milestones: Milestones | None = None
        self._charged = False  # the blocks of the next iteration are reserved
        self._fresh: list[RequestState] = []  # were not in a step yet

    def __len__(self) -> int:
        return len(self.members)

    # -- members --------------------------------------------------------------------

    def join(self, state: RequestState) -> None:
        """Takes in a request that lacks the KV of its newest token only."""
        context = state.context
        state.batch, state.joined = self, self.iteration
        state.base = context - self.iteration
        self.members.append(state)
        self._fresh.append(state)
        self.context += context
        if self._milestones:
            self._milestones.add(state, context)

    def leave(self, state: RequestState) -> None:
        """Lets a member go, with all its tokens stamped."""
        if self._milestones:
            self._milestones.remove(state)
        self.settle(state)
        context = state.context
        state.settled_context, state.settled_known = context, context + 1
        self.context -= context
        state.batch = None
        self.members.remove(state)
        if state in self._fresh:
            self._fresh.remove(state)

    def settle(self, state: RequestState) -> None:
        """Stamps the tokens that a member got."""
        if state.active:
            state.timeline.token_s += self._ends_s[state.joined : self.iteration]
        state.joined = self.iteration

    def split(self, decodes: Sequence[RequestState], spare: DecodeBatch) -> DecodeBatch:
        """Divides into those of `decodes` and the others: (the batch of `decodes`).

        The other part is in this batch or in `spare`, whichever is not returned. Only
        the smaller part is looked at member by member.
        """
        count = len(decodes)
        head, rest = self.members[:count], self.members[count:]
        if head != decodes:  # it is for most policies, and is quickly compared
            chosen = set(decodes)
            head = [state for state in self.members if state in chosen]
            rest = [state for state in self.members if state not in chosen]
            if len(head) < count:
                raise RuntimeError(f"{count - len(head)} to decode are not ready")
        if len(head) < len(rest):
            self._hand_over(head, self._context_of(head), spare)
            self.members, spare.members = rest, head
            return spare
        self._hand_over(rest, self._context_of(rest), spare)
        self.members, spare.members = head, rest
        return self

    def _context_of(self, states: Collection[RequestState]) -> int:
        return sum([state.base for state in states]) + self.iteration * len(states)

    def absorb(self, other: DecodeBatch) -> tuple[DecodeBatch, DecodeBatch]:
        """Brings the members of `other` behind its own: (batch of all, the empty one).

        Only those of the smaller batch are looked at.
        """
        if len(self.members) >= len(other.members):
            other._hand_over(other.members, other.context, self)
            self.members += other.members
            other.members = []
            return self, other
        self._hand_over(self.members, self.context, other)
        other.members[:0] = self.members
        self.members = []
        return other, self

    def _hand_over(
        self, states: Collection[RequestState], context: int, to: DecodeBatch
    ) -> None:
        """Makes members of this batch those of another, but for the queue order.

        `context` is theirs together.
        """
        if not states:
            return
        self.context -= context
        to.context += context
        now, ends_s, then = self.iteration, self._ends_s, to.iteration
        shift = now - then
        for state in states:
            if state.joined < now:
                state.timeline.token_s += ends_s[state.joined : now]
            state.base += shift
            state.joined = then
            state.batch = to
        self._milestones = None
        if to._milestones:
            for state in states:
                to._milestones.add(state, state.base + then)
        if self._fresh:
            to._fresh += [state for state in self._fresh if state.batch is to]
            self._fresh = [state for state in self._fresh if state.batch is self]

    def forget(self) -> None:
        """Forget all iterations. The batch has no members, so nobody needs them.

        Otherwise their ends would add up to the length of the run, for every instance.
        """
        self.iteration = 0
        self._ends_s = []
        self._milestones = None

    def within(self, tokens: int) -> Sequence[RequestState]:
        """The longest head of the queue that attends to at most `tokens` tokens.

        Those that the next iteration adds are included.
        """
        next_iteration = self.iteration + 1
        rows, over = len(self.members), self.context + len(self.members) - tokens
        while over > 0:  # from the tail: in a step that is capped fewer stay than go
            rows -= 1
            over -= self.members[rows].base + next_iteration
        return self.members[:rows]

    def take_fresh(self) -> Iterable[RequestState]:
        """The members that are new since this was last asked."""
        fresh, self._fresh = self._fresh, []
        return fresh

    @property
    def finished(self) -> list[RequestState]:
        """Members that have all their tokens, in order of arrival."""
        now = self.iteration
        if self._milestones:
            states = list(self._milestones.ending.get(now, {}).values())
        else:
            states = [s for s in self.members if s.base + now == s.limit]
        return sorted(states, key=lambda state: state.order) if states else []

    # -- iterations -----------------------------------------------------------------

    def start(self) -> None:
        """The first iteration of a step begins."""
        self.stepping = True
        self.charge()

    def charge(self) -> None:
        """Reserves the blocks of the iteration that begins."""
        self._charge(self.iteration + 1)
        self._charged = True

    def _charge(self, end: int) -> None:
        """Reserves the blocks of all iterations before `end`."""
        begun = self.iteration + self._charged
        if self._milestones:
            self._milestones.charge(begun, end)
            return
        for iteration in range(begun, end):
            if owners := self._crossing(iteration):
                self._blocks.add_to_each(owners)

    def _crossing(self, iteration: int) -> Collection[int]:
        """Those that need a block for `iteration`, found one by one."""
        size, held = self._block_tokens, self._blocks.held
        return [
            state.id
            for state in self.members
            if not (state.base + iteration) % size
            and held(state.id) * size <= state.base + iteration
        ]

    def advance(self, ends_s: Sequence[float], goes_on: bool = False) -> None:
        """Iterations are over, at `ends_s`; if it `goes_on`, another has begun."""
        count = len(ends_s)
        if count + goes_on > self._charged:
            self._charge(self.iteration + count + goes_on)
        self.iteration += count
        self._charged = goes_on
        self._ends_s += ends_s
        self.context += count * len(self.members)

    @property
    def begun(self) -> int:
        """Iterations completed or going on."""
        return self.iteration + self._charged

    def missing(self, iterations: int = 1) -> int:
        """Blocks that the next iterations, not begun yet, must still get.

        Of no more iterations than any member has left.
        """
        if not self.members:
            return 0
        return self._ahead().missing(self.begun, iterations)

    def fits(self, iterations: int, free: int) -> bool:
        """Whether the next iterations, not begun yet, can run on `free` blocks."""
        ahead = self._ahead()
        at_most = (iterations // self._block_tokens + 1) * ahead.growing
        return at_most <= free or ahead.missing(self.begun, iterations) <= free

    def lasting(self, free: int) -> int:
        """Iterations until a member is finished or `free` blocks are used up."""
        iterations = self._ahead().next_end() - self.iteration
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

    def _ahead(self) -> Milestones:
        if self._milestones is None:
            self._milestones = Milestones(self._blocks)
            for state in self.members:
                self._milestones.add(state, state.base + self.begun)
        return self._milestones


class Milestones:
    """In which iterations of a batch its members need a block, or are finished.

    Attributes:
      growing: members that can need another block.
      ending: by iteration, those that have all their tokens after it, by id.
    """

    def __init__(self, blocks: KVBlocks):
        self.growing = 0
        self.ending: dict[int, dict[int, RequestState]] = {}
        self._end_iterations: list[int] = []  # a heap; some may be outdated
        self._blocks = blocks
        self._block_tokens = blocks.memory.block_tokens
        # Those in phase p cross into another block when p + iteration is a multiple of
        # the block size. Those that hold all blocks they can need are in no phase.
        self._phases: dict[int, dict[int, None]] = {}
        self._prepaid: set[int] = set()  # hold the block of their next token already

    def add(self, state: RequestState, context: int) -> None:
        """Takes note of a member; `context` of its tokens have a block."""
        size, id = self._block_tokens, state.id
        held = self._blocks.held(id)
        if held * size < state.limit:
            self.growing += 1
            self._phases.setdefault(state.base % size, {})[id] = None
            if held > -(-context // size):
                self._prepaid.add(id)
        last = state.limit - state.base
        if last not in self.ending:
            self.ending[last] = {}
            heapq.heappush(self._end_iterations, last)
        self.ending[last][id] = state

    def remove(self, state: RequestState) -> None:
        """Forgets a member."""
        phase = self._phases.get(state.base % self._block_tokens, {})
        if state.id in phase:
            self.growing -= 1
            del phase[state.id]
            self._prepaid.discard(state.id)
        del self.ending[state.limit - state.base][state.id]

    def charge(self, begun: int, end: int) -> None:
        """Gives members the blocks they need for the iterations from `begun` on."""
        size, phases = self._block_tokens, self._phases
        for iteration in range(begun, end):
            owners: Collection[int] = phases.get(-iteration % size, ())
            if self._prepaid:  # for the first of them
                owners = [o for o in owners if o not in self._prepaid]
                self._prepaid.clear()
            if owners:
                self._blocks.add_to_each(owners)

    def missing(self, begun: int, iterations: int) -> int:
        """Blocks needed for so many iterations from `begun` on."""
        size = self._block_tokens
        cycles, rest = divmod(iterations, size)
        blocks = cycles * self.growing - len(self._prepaid)
        for iteration in range(begun, begun + rest):
            blocks += len(self._phases.get(-iteration % size, ()))
        return blocks

    def next_end(self) -> int:
        """The iteration after which the first member has all its tokens."""
        while not self.ending[self._end_iterations[0]]:
            del self.ending[heapq.heappop(self._end_iterations)]
        return self._end_iterations[0]
