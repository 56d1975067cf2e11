"""The record of an instance, and of the work in flight on it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.control.request_state import DecodeBatch, RequestState, in_order
from disagg_jax.deployment import InstanceSpec, KVMemory
from disagg_jax.work import Step, Transfer


@dataclasses.dataclass(slots=True, eq=False)
class StepInFlight:
    """A step that was submitted, with its requests."""

    work: Step
    prompts: Sequence[RequestState]  # compute a chunk of their tokens
    batch: DecodeBatch  # the requests that decode
    cancelled: tuple[RequestState, ...] = ()
    until: int = 0  # iteration of the batch with which the step ends
    cut: bool = False  # whether the step was told to end earlier

    @property
    def states(self) -> list[RequestState]:
        """All requests of the step."""
        return [*self.prompts, *self.batch.members]


@dataclasses.dataclass(slots=True, eq=False)
class TransferInFlight:
    """A transfer that was submitted, with its request."""

    work: Transfer
    state: RequestState

    @property
    def states(self) -> list[RequestState]:
        """The request, as a list."""
        return [self.state]


InFlight = StepInFlight | TransferInFlight


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class InstanceState:
    """One instance: its queue, its requests, its KV blocks.

    It is the `InstanceView` of policies and routers, which says what its counts mean.
    """

    id: int
    spec: InstanceSpec
    memory: KVMemory
    up: bool = True
    step: StepInFlight | None = None  # on the first pipeline stage
    # Steps on later stages; empty with one stage.
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
    # Requests parked elsewhere that this instance is to pull, and requests on their
    # way here.
    pull_queue: collections.deque[RequestState] = dataclasses.field(
        default_factory=collections.deque[RequestState]
    )
    arriving: dict[int, RequestState] = dataclasses.field(
        default_factory=dict[int, RequestState]
    )
    blocks: KVBlocks = dataclasses.field(init=False)
    ready: DecodeBatch = dataclasses.field(init=False)  # can decode; not in a step
    no_decodes: DecodeBatch = dataclasses.field(init=False)  # of a prompts-only step
    _spares: list[DecodeBatch] = dataclasses.field(default_factory=list[DecodeBatch])

    def __post_init__(self) -> None:
        self.blocks = KVBlocks(self.memory)
        self.ready, self.no_decodes = DecodeBatch(self.blocks), DecodeBatch(self.blocks)

    def __repr__(self) -> str:
        return f"instance {self.id} ({self.spec})"

    def reuse_batch(self) -> DecodeBatch:
        """Return an empty batch, a used one if there is any."""
        return self._spares.pop() if self._spares else DecodeBatch(self.blocks)

    def rejoin_ready(self, batch: DecodeBatch) -> None:
        """Return a finished step's decodes to the ready queue.

        They come behind requests that joined during the step.
        """
        batch.stepping = False
        if batch is not self.no_decodes:
            self.ready, spare = self.ready.absorb(batch)
            spare.forget()
            self._spares.append(spare)

    @property
    def takes_a_step(self) -> bool:
        """Whether the first stage is free, and fewer steps in flight than stages.

        Without the second rule a fast first stage would send off ever smaller steps,
        to wait before the slowest. vLLM has it too: a batch in flight for each stage.
        """
        return self.step is None and len(self.downstream) < self.spec.parallelism.pp

    @property
    def has_ready(self) -> bool:
        """Whether there is any request to plan a step for."""
        return bool(self.waiting or self.partly or self.ready.members)

    @property
    def steps(self) -> list[StepInFlight]:
        """All steps in flight."""
        first = [] if self.step is None else [self.step]
        return [*self.downstream.values(), *first] if self.downstream else first

    @property
    def stepping(self) -> list[RequestState]:
        """The requests in a step."""
        return [state for flight in self.steps for state in flight.states]

    # -- the view of policies and routers -------------------------------------------

    @property
    def running(self) -> Sequence[RequestState]:
        return self.ready.members

    @property
    def partial(self) -> list[RequestState]:
        return in_order(self.partly.values())

    @property
    def running_context(self) -> int:
        return self.ready.context

    def running_within(self, tokens: int) -> Sequence[RequestState]:
        return self.ready.within(tokens)

    @property
    def blocks_for_next_token(self) -> int:
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
        return self.resident + len(self.waiting) + len(self.pull_queue)
