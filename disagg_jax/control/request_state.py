"""The record of a request, and the batch that it decodes in.

One file, since each names the other.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
from collections.abc import Collection, Iterable, Sequence

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.work import Slice


class Place(enum.Enum):
    """Where a request is; it is in exactly one place."""

    UNROUTED = enum.auto()  # no instance for it is up
    WAITING = enum.auto()  # in an instance's queue, without KV
    STEPPING = enum.auto()  # in a step
    PARTIAL = enum.auto()  # some of its tokens have KV; ready for the next chunk
    RUNNING = enum.auto()  # all but its newest token have KV; ready to decode
    PARKED = enum.auto()  # prefilled; KV stays until the decode side pulls it
    MOVING = enum.auto()  # in a transfer
    ENDED = enum.auto()  # in no container: over, refused, or not queued yet


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class RequestState:
    """One request on its way.

    While a request decodes in a batch, its token counts and its place follow from the
    batch. They are set here at all other times.
    """

    request: Request
    order: int  # place in arrival order
    timeline: Timeline
    instance: int | None = None  # the instance that queues it or has its KV
    # PARKED, MOVING: the instance that pulls its KV. Before: the instance to which the
    # KV computed so far is sent.
    pull_target: int | None = None
    blocks_sent: int = 0  # blocks of KV that left, or are leaving, for the pull target
    transfers_in_flight: int = 0  # to the pull target
    batch: DecodeBatch | None = None  # the batch it decodes in
    base: int = 0  # its cached tokens less the iterations of the batch
    joined: int = 0  # iteration of the batch up to which its tokens are stamped
    id: int = dataclasses.field(init=False)  # of the request: it is asked for often
    # Tokens whose KV it can ever need: all but the last one it may generate.
    max_cached_tokens: int = dataclasses.field(init=False)
    _num_tokens: int = dataclasses.field(init=False)
    _cached_tokens: int = dataclasses.field(init=False, default=0)
    _place: Place = dataclasses.field(init=False, default=Place.ENDED)

    def __post_init__(self) -> None:
        request = self.request
        self.id = request.id
        self.max_cached_tokens = request.prompt_tokens + request.max_tokens - 1
        self._num_tokens = request.prompt_tokens

    def __repr__(self) -> str:
        return f"request {self.id}"

    @property
    def num_tokens(self) -> int:
        """Prompt tokens plus generated tokens."""
        if self.batch is None:
            return self._num_tokens
        return self.base + self.batch.iteration + 1

    @property
    def cached_tokens(self) -> int:
        """Tokens whose KV is cached."""
        if self.batch is None:
            return self._cached_tokens
        return self.base + self.batch.iteration

    @property
    def place(self) -> Place:
        """Where the request is."""
        if self.batch is None:
            return self._place
        return Place.STEPPING if self.batch.stepping else Place.RUNNING

    @place.setter
    def place(self, place: Place) -> None:
        self._place = place

    @property
    def complete(self) -> bool:
        """Whether all its tokens have KV, so that a new token comes next."""
        return self.batch is None and self._cached_tokens == self._num_tokens

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        tokens = self._num_tokens if self.batch is None else self.num_tokens
        return tokens - self.request.prompt_tokens

    @property
    def active(self) -> bool:
        """Whether it is not finished, cancelled or refused."""
        return self.timeline.status is Status.ACTIVE

    def set_tokens(self, num_tokens: int, cached_tokens: int) -> None:
        """Set the token counts of a request that is in no batch."""
        self._num_tokens, self._cached_tokens = num_tokens, cached_tokens

    def add_token(self) -> None:
        """Count a token that a prefill produced."""
        self._num_tokens += 1

    def finish_chunk(self, end: int) -> None:
        """Count the tokens up to `end` as cached; the request needs a new place."""
        self._cached_tokens, self._place = end, Place.RUNNING

    def clear(self) -> None:
        """Forget instances and cached tokens of a request that is in no container."""
        self._cached_tokens, self._place = 0, Place.ENDED
        self.instance = self.pull_target = None
        self.blocks_sent = self.transfers_in_flight = 0

    def slice(self, start: int, count: int, blocks: tuple[int, ...]) -> Slice:
        """Return the slice of `count` tokens that follow `start` cached tokens."""
        end = start + count
        return Slice(
            request=self.request,
            start=start,
            count=count,
            samples=end == self.num_tokens,
            blocks=blocks,
            tokens=self._tokens(start, end),
        )

    def _tokens(self, start: int, end: int) -> tuple[int, ...]:
        prompt = self.request.prompt
        if prompt is None:
            return ()
        size, generated = len(prompt), self.timeline.tokens
        if start >= size:
            return tuple(generated[start - size : end - size])
        return prompt[start:end] + tuple(generated[: max(0, end - size)])


def in_order(states: Iterable[RequestState]) -> list[RequestState]:
    """Return `states` in order of arrival."""
    return sorted(states, key=lambda state: state.order)


class DecodeBatch:
    """Requests that each compute one token in every iteration, advanced as one.

    A member's tokens are those it had on joining plus one per iteration since, stamped
    with the ends of these iterations. So an iteration costs O(1), not O(members).
    `Milestones` keep the iterations in which members need a block or finish. A look
    ahead makes them on first use: where members change with every iteration, visiting
    each member is cheaper.

    Attributes:
      members: in queue order.
      iteration: iterations completed.
      context: cached tokens of all members together.
      stepping: whether the batch is in a step. Only an idle batch takes members in.
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
        self._reserved = False  # whether the next iteration has its blocks
        self._first_step: list[RequestState] = []  # members that were in no step yet

    def __len__(self) -> int:
        return len(self.members)

    # -- members --------------------------------------------------------------------

    def join(self, state: RequestState) -> None:
        """Add a request whose tokens have KV, except the newest."""
        context = state.cached_tokens
        state.batch, state.joined = self, self.iteration
        state.base = context - self.iteration
        self.members.append(state)
        self._first_step.append(state)
        self.context += context
        if self._milestones:
            self._milestones.add(state, context)

    def leave(self, state: RequestState) -> None:
        """Remove a member, with all its tokens stamped."""
        if self._milestones:
            self._milestones.remove(state)
        self.settle(state)
        context = state.base + self.iteration
        state.batch = None
        state.set_tokens(context + 1, context)
        self.context -= context
        self.members.remove(state)
        if state in self._first_step:
            self._first_step.remove(state)

    def settle(self, state: RequestState) -> None:
        """Stamp the tokens of a member up to now."""
        if state.active:
            state.timeline.token_s += self._ends_s[state.joined : self.iteration]
        state.joined = self.iteration

    def split(self, decodes: Sequence[RequestState], spare: DecodeBatch) -> DecodeBatch:
        """Move `decodes` and the remaining requests into separate batches.

        Only the smaller part is visited member by member.

        Returns:
          The batch with `decodes`, this one or `spare`; the other has the rest.
        """
        count = len(decodes)
        head, rest = self.members[:count], self.members[count:]
        if head != decodes:  # equal for most policies, and quickly compared
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
        """Put the members of `other` behind the members of this batch.

        Only the members of the smaller batch are visited.

        Returns:
          The batch with all members, and the empty one.
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
        """Make members of this batch members of another, except for the queue order.

        `context` is their cached tokens together.
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
        first = self._first_step
        if first:
            to._first_step += [state for state in first if state.batch is to]
            self._first_step = [state for state in first if state.batch is self]

    def forget(self) -> None:
        """Forget all iterations of a batch without members.

        Otherwise the ends of iterations would add up to the length of the run, for
        every instance.
        """
        self.iteration = 0
        self._ends_s = []
        self._milestones = None

    def within(self, tokens: int) -> Sequence[RequestState]:
        """Return the longest head of the queue that attends to at most `tokens` tokens.

        Tokens that the next iteration adds are included.
        """
        next_iteration = self.iteration + 1
        rows, over = len(self.members), self.context + len(self.members) - tokens
        while over > 0:  # from the tail: in a step that is capped fewer stay than go
            rows -= 1
            over -= self.members[rows].base + next_iteration
        return self.members[:rows]

    def take_first_steps(self) -> Iterable[RequestState]:
        """Return the members that were in no step yet, each in one call only."""
        first, self._first_step = self._first_step, []
        return first

    @property
    def finished(self) -> list[RequestState]:
        """Members that have all their tokens, in order of arrival."""
        now = self.iteration
        if self._milestones:
            states = list(self._milestones.ending.get(now, {}).values())
        else:
            states = [s for s in self.members if s.base + now == s.max_cached_tokens]
        return in_order(states) if states else []

    # -- iterations -----------------------------------------------------------------

    def start(self) -> None:
        """Begin the first iteration of a step."""
        self.stepping = True
        self.reserve()

    def reserve(self) -> None:
        """Reserve the blocks of the iteration that begins."""
        self._reserve(self.iteration + 1)
        self._reserved = True

    def _reserve(self, end: int) -> None:
        """Reserve the blocks of all iterations before `end`."""
        begun = self.iteration + self._reserved
        if self._milestones:
            self._milestones.reserve(begun, end)
            return
        for iteration in range(begun, end):
            if owners := self._crossing(iteration):
                self._blocks.add_to_each(owners)

    def _crossing(self, iteration: int) -> Collection[int]:
        """Visit all members for the ids of those that need a block for `iteration`."""
        size, held = self._block_tokens, self._blocks.held
        return [
            state.id
            for state in self.members
            if not (state.base + iteration) % size
            and held(state.id) * size <= state.base + iteration
        ]

    def advance(self, ends_s: Sequence[float], goes_on: bool = False) -> None:
        """Complete iterations that ended at `ends_s`; begin another if it `goes_on`."""
        count = len(ends_s)
        if count + goes_on > self._reserved:
            self._reserve(self.iteration + count + goes_on)
        self.iteration += count
        self._reserved = goes_on
        self._ends_s += ends_s
        self.context += count * len(self.members)

    @property
    def attended(self) -> int:
        """Count the KV blocks that the next iteration attends to, of all members."""
        now, size = self.iteration, self._block_tokens
        return sum([(state.base + now) // size + 1 for state in self.members])

    @property
    def begun(self) -> int:
        """Iterations completed or going on."""
        return self.iteration + self._reserved

    def missing(self, iterations: int = 1) -> int:
        """Count the blocks that the next iterations must still get.

        The iterations have not begun, and no member finishes before the last of them.
        """
        if not self.members:
            return 0
        return self._ahead().missing(self.begun, iterations)

    def fits(self, iterations: int, free: int) -> bool:
        """Return whether the next iterations, not begun yet, fit into `free` blocks."""
        ahead = self._ahead()
        at_most = (iterations // self._block_tokens + 1) * ahead.growing
        return at_most <= free or ahead.missing(self.begun, iterations) <= free

    def iterations_until_change(self, free: int) -> int:
        """Count the iterations until a member finishes or `free` blocks are used up."""
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
    """The iterations of a batch in which its members need a block, or finish.

    Attributes:
      growing: number of members that can need another block.
      ending: by iteration, the members that finish with it, by id.
    """

    def __init__(self, blocks: KVBlocks):
        self.growing = 0
        self.ending: dict[int, dict[int, RequestState]] = {}
        self._end_iterations: list[int] = []  # a heap; some may be outdated
        self._blocks = blocks
        self._block_tokens = blocks.memory.block_tokens
        # Members in phase p cross into another block when p + iteration is a multiple
        # of the block size. Members that hold all blocks they can need have no phase.
        self._phases: dict[int, dict[int, None]] = {}
        self._prepaid: set[int] = set()  # hold the block of their next token already

    def add(self, state: RequestState, context: int) -> None:
        """Add a member; `context` of its tokens have a block."""
        size, id = self._block_tokens, state.id
        held = self._blocks.held(id)
        if held * size < state.max_cached_tokens:
            self.growing += 1
            self._phases.setdefault(state.base % size, {})[id] = None
            if held > -(-context // size):
                self._prepaid.add(id)
        last = state.max_cached_tokens - state.base
        if last not in self.ending:
            self.ending[last] = {}
            heapq.heappush(self._end_iterations, last)
        self.ending[last][id] = state

    def remove(self, state: RequestState) -> None:
        """Remove a member."""
        phase = self._phases.get(state.base % self._block_tokens, {})
        if state.id in phase:
            self.growing -= 1
            del phase[state.id]
            self._prepaid.discard(state.id)
        del self.ending[state.max_cached_tokens - state.base][state.id]

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
