"""The records that the controller and the cluster keep of requests and instances."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterable

from disagg_jax.deployment import InstanceSpec, KVMemory
from disagg_jax.kv_blocks import KVBlocks
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.work import Slice, Step, Transfer


class Place(enum.Enum):
    """Where a request is; it is in exactly one place."""

    UNROUTED = enum.auto()  # no instance for it is up
    WAITING = enum.auto()  # in an instance's queue, without KV
    STEPPING = enum.auto()  # in a step
    RUNNING = enum.auto()  # has KV, ready for its next step
    PARKED = enum.auto()  # prefilled; KV stays until the decode side pulls it
    MOVING = enum.auto()  # in a transfer
    ENDED = enum.auto()  # in no container: over, refused, or not taken in yet


@dataclasses.dataclass(slots=True, eq=False)
class RequestState:
    """One request on its way."""

    request: Request
    order: int  # place in arrival order
    timeline: Timeline
    known: int  # prompt + generated tokens
    context: int = 0  # tokens whose KV is cached
    place: Place = Place.ENDED
    holder: InstanceState | None = None  # whose queue it is in, or who has its KV
    target: InstanceState | None = None  # PARKED, MOVING: who pulls it

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self.known - self.request.prompt_tokens

    @property
    def active(self) -> bool:
        """Not finished, cancelled or refused."""
        return self.timeline.status is Status.ACTIVE

    def slice(self, count: int, blocks: tuple[int, ...]) -> Slice:
        """The next `count` tokens to compute."""
        end = self.context + count
        return Slice(
            request=self.request,
            start=self.context,
            count=count,
            samples=end == self.known,
            blocks=blocks,
            tokens=self._tokens(self.context, end),
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
class InstanceState:
    """One instance: its queue, its requests, its KV blocks."""

    id: int
    spec: InstanceSpec
    memory: KVMemory
    up: bool = True
    step: Step | None = None  # the step in flight
    waiting: collections.deque[RequestState] = dataclasses.field(
        default_factory=collections.deque[RequestState]
    )
    stepping: list[RequestState] = dataclasses.field(default_factory=list[RequestState])
    running: list[RequestState] = dataclasses.field(default_factory=list[RequestState])
    parked: list[RequestState] = dataclasses.field(default_factory=list[RequestState])
    # Requests this instance is to pull: parked elsewhere, and being moved here.
    pulls: collections.deque[RequestState] = dataclasses.field(
        default_factory=collections.deque[RequestState]
    )
    arriving: dict[int, RequestState] = dataclasses.field(
        default_factory=dict[int, RequestState]
    )
    blocks: KVBlocks = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.blocks = KVBlocks(self.memory)

    @property
    def queued(self) -> int:
        return len(self.waiting) + sum(s.generated == 0 for s in self.stepping)

    @property
    def resident(self) -> int:
        return len(self.running) + len(self.stepping) + len(self.arriving)

    @property
    def load(self) -> int:
        return self.resident + len(self.waiting) + len(self.pulls)


@dataclasses.dataclass(slots=True, eq=False)
class InFlight:
    """A piece of work that was submitted, with the requests it carries."""

    work: Step | Transfer
    states: tuple[RequestState, ...]
