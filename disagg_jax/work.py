"""What the controller asks for (work) and what it is told (events)."""

from __future__ import annotations

import dataclasses

from disagg_jax.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The part of one request that a step computes: tokens [start, start + count).

    Prefill, a chunk of one, a decode and recompute are all this. It is complete in
    itself, so that an executor needs no memory of requests.
    """

    request: Request
    start: int  # tokens of the request that are in the cache already
    count: int  # tokens to compute
    samples: bool  # whether a new token comes out: the last known token is computed
    blocks: tuple[int, ...]  # KV blocks covering [0, start + count)
    tokens: tuple[int, ...]  # `count` token ids; () where only lengths matter

    @property
    def sample_index(self) -> int:
        """Which generated token comes out: 0 for the first."""
        return self.start + self.count - self.request.prompt_tokens

    @property
    def is_decode(self) -> bool:
        """Whether this is one token on top of cached context."""
        return self.count == 1 and self.start > 0


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one instance."""

    id: int
    instance: int
    slices: tuple[Slice, ...]

    @property
    def instances(self) -> tuple[int, ...]:
        """The instances it occupies or touches."""
        return (self.instance,)


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """One request's KV moves from one instance's blocks to another's."""

    id: int
    request: Request
    src: int  # instance
    dst: int  # instance
    src_blocks: tuple[int, ...]
    dst_blocks: tuple[int, ...]  # as many as src_blocks, in the same order
    context: int  # tokens whose KV is in those blocks

    @property
    def instances(self) -> tuple[int, ...]:
        """The instances it occupies or touches."""
        return (self.src, self.dst)


Work = Step | Transfer


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """A client sent a request."""

    request: Request


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A step or a transfer is complete; sent once for each."""

    work: int  # Step.id or Transfer.id
    start_s: float  # when it began on its device or link
    end_s: float  # when its result was there
    tokens: tuple[
        int, ...
    ] = ()  # step: one per sampling slice; () where there are none
    bytes: int = 0  # transfer: KV bytes moved


@dataclasses.dataclass(frozen=True, slots=True)
class Cancelled:
    """A client hung up."""

    request: int


@dataclasses.dataclass(frozen=True, slots=True)
class Down:
    """An instance is lost with all its KV; no Done of its work follows."""

    instance: int


@dataclasses.dataclass(frozen=True, slots=True)
class Up:
    """A lost instance is back, empty."""

    instance: int


Event = Arrived | Done | Cancelled | Down | Up
