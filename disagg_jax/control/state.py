"""The records that the controller and the cluster keep of requests and instances."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterable, Sequence

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.control.decode_batch import DecodeBatch
from disagg_jax.deployment import InstanceSpec, KVMemory
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.work import Slice, Step, Transfer


class Place(enum.Enum):
    """Where a request is; it is in exactly one place."""

    UNROUTED = enum.auto()  # no instance for it is up
    WAITING = enum.auto()  # in an instance's queue, without KV
    STEPPING = enum.auto()  # in a step
    PARTIAL = enum.auto()  # a part of its known tokens has KV; ready for the next part
    RUNNING = enum.auto()  # all but its newest token has KV; ready to decode
    PARKED = enum.auto()  # prefilled; KV stays until the decode side pulls it
    MOVING = enum.auto()  # in a transfer
    ENDED = enum.auto()  # in no container: over, refused, or not taken in yet


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class RequestState:
    """One request on its way.

    While it decodes in a batch, what it knows grows with the batch, and the settled
    numbers are outdated.
    """

    request: Request
    order: int  # place in arrival order
    timeline: Timeline
    settled_known: int  # prompt + generated tokens
    settled_context: int = 0  # tokens whose KV is cached
    settled_place: Place = Place.ENDED  # where it is, if it is in no batch
    holder: InstanceState | None = None  # whose queue it is in, or who has its KV
    # PARKED, MOVING: who pulls it. Before: who gets what is computed so far.
    target: InstanceState | None = None
    sent: int = 0  # blocks of KV that left, or are leaving, for the target
    landing: int = 0  # transfers to the target that are not over
    batch: DecodeBatch | None = None  # that it decodes in
    base: int = 0  # its context, less the iterations of the batch
    joined: int = 0  # iteration of the batch up to which its tokens are stamped
    id: int = dataclasses.field(init=False)  # of the request: it is asked for often
    # Tokens whose KV it can ever need: all but the last one it may generate.
    limit: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.id = request.id
        self.limit = request.prompt_tokens + request.max_tokens - 1

    def __repr__(self) -> str:
        return f"request {self.id}"

    @property
    def known(self) -> int:
        """Prompt + generated tokens."""
        if self.batch is None:
            return self.settled_known
        return self.base + self.batch.iteration + 1

    @property
    def context(self) -> int:
        """Tokens whose KV is cached."""
        if self.batch is None:
            return self.settled_context
        return self.base + self.batch.iteration

    @property
    def complete(self) -> bool:
        """Whether all known tokens have KV, so that the next one is to come."""
        return self.context == self.known

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self.known - self.request.prompt_tokens

    @property
    def place(self) -> Place:
        if self.batch is None:
            return self.settled_place
        return Place.STEPPING if self.batch.stepping else Place.RUNNING

    @property
    def active(self) -> bool:
        """Not finished, cancelled or refused."""
        return self.timeline.status is Status.ACTIVE

    def slice(self, start: int, count: int, blocks: tuple[int, ...]) -> Slice:
        """The next `count` tokens to compute; `start` are cached."""
        end = start + count
        return Slice(
            request=self.request,
            start=start,
            count=count,
            samples=end == self.known,
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
    """`states` in order of arrival."""
    return sorted(states, key=lambda state: state.order)


@dataclasses.dataclass(slots=True, eq=False)
class StepInFlight:
    """A step that was submitted, with the requests in it."""

    work: Step
    prompts: Sequence[RequestState]  # those that compute a chunk of their known tokens
    batch: DecodeBatch  # those that decode
    cancelled: tuple[RequestState, ...] = ()
    until: int = 0  # iteration of the batch with which it ends
    cut: bool = False  # whether it was told to end earlier

    @property
    def states(self) -> list[RequestState]:
        """All its requests."""
        return [*self.prompts, *self.batch.members]


@dataclasses.dataclass(slots=True, eq=False)
class TransferInFlight:
    """A transfer that was submitted, with its request."""

    work: Transfer
    state: RequestState

    @property
    def states(self) -> list[RequestState]:
        return [self.state]


InFlight = StepInFlight | TransferInFlight


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class InstanceState:
    """One instance: its queue, its requests, its KV blocks."""

    id: int
    spec: InstanceSpec
    memory: KVMemory
    up: bool = True
    step: StepInFlight | None = None  # the one on the first pipeline stage
    # Those that are on later stages: with one stage there are none.
    downstream: dict[int, StepInFlight] = dataclasses.field(
        default_factory=dict[int, StepInFlight]
    )
    waiting: collections.deque[RequestState] = dataclasses.field(
        default_factory=collections.deque[RequestState]
    )
    partly: dict[int, RequestState] = dataclasses.field(
        default_factory=dict[int, RequestState]
    )
    parked: dict[int, RequestState] = dataclasses.field(
        default_factory=dict[int, RequestState]
    )
    # Requests this instance is to pull: parked elsewhere, and being moved here.
    pulls: collections.deque[RequestState] = dataclasses.field(
        default_factory=collections.deque[RequestState]
    )
    arriving: dict[int, RequestState] = dataclasses.field(
        default_factory=dict[int, RequestState]
    )
    blocks: KVBlocks = dataclasses.field(init=False)
    ready: DecodeBatch = dataclasses.field(init=False)  # can decode; not in a step
    nobody: DecodeBatch = dataclasses.field(init=False)  # of a step of prompts only
    _spares: list[DecodeBatch] = dataclasses.field(default_factory=list[DecodeBatch])

    def __post_init__(self) -> None:
        self.blocks = KVBlocks(self.memory)
        self.ready, self.nobody = DecodeBatch(self.blocks), DecodeBatch(self.blocks)

    def __repr__(self) -> str:
        return f"instance {self.id} ({self.spec})"

    def spare_batch(self) -> DecodeBatch:
        """An empty batch, one used before if there is any."""
        return self._spares.pop() if self._spares else DecodeBatch(self.blocks)

    def take_back(self, batch: DecodeBatch) -> None:
        """Those in `batch` are ready again, behind those that became so meanwhile."""
        batch.stepping = False
        if batch is not self.nobody:
            self.ready, spare = self.ready.absorb(batch)
            spare.forget()
            self._spares.append(spare)

    @property
    def running(self) -> Sequence[RequestState]:
        return self.ready.members

    @property
    def partial(self) -> list[RequestState]:
        return in_order(self.partly.values())

    @property
    def takes_a_step(self) -> bool:
        """Whether the first stage is free, and fewer steps in flight than stages.

        Without the second rule a faster first stage would send off ever smaller steps,
        to wait before the slowest. vLLM has it too: a batch in flight for each stage.
        """
        return self.step is None and len(self.downstream) < self.spec.pp

    @property
    def has_ready(self) -> bool:
        """Whether there is anybody to plan a step for."""
        return bool(self.waiting or self.partly or self.ready.members)

    @property
    def steps(self) -> list[StepInFlight]:
        """All that is in flight."""
        first = [] if self.step is None else [self.step]
        return [*self.downstream.values(), *first] if self.downstream else first

    @property
    def stepping(self) -> list[RequestState]:
        """The requests in a step."""
        return [state for flight in self.steps for state in flight.states]

    @property
    def running_context(self) -> int:
        return self.ready.context

    def running_within(self, tokens: int) -> Sequence[RequestState]:
        return self.ready.within(tokens)

    @property
    def growth(self) -> int:
        return self.ready.missing()

    @property
    def queued(self) -> int:
        queued = len(self.waiting)
        for state in self.partly.values():
            queued += state.generated == 0
        for flight in self.steps:
            for state in flight.prompts:
                queued += state.generated == 0
        return queued

    @property
    def resident(self) -> int:
        resident = len(self.ready.members) + len(self.partly) + len(self.arriving)
        for flight in self.steps:
            resident += len(flight.prompts) + len(flight.batch.members)
        return resident

    @property
    def load(self) -> int:
        return self.resident + len(self.waiting) + len(self.pulls)
