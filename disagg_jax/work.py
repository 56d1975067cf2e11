"""Work that the controller asks for, and events that it is told.

No code changes a record once it is made. Yet they are not frozen, since a simulation
makes many: a frozen dataclass takes five times as long to make, a named tuple 1.5
times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

from disagg_jax.request import Request

Item = TypeVar("Item")


class OnRead(Sequence[Item]):
    """A sequence that `make(*args)` makes when it is first read.

    It holds details of work for an engine, which reads them on submission. A cost model
    never does, and making them takes longer than simulating the work.
    """

    __slots__ = ("_make", "_args", "_items")

    def __init__(self, make: Callable[..., Sequence[Item]], *args: object):
        self._make, self._args = make, args
        self._items: Sequence[Item] | None = None

    def _made(self) -> Sequence[Item]:
        if self._items is None:
            self._items = self._make(*self._args)
        return self._items

    def __len__(self) -> int:
        return len(self._made())

    def __iter__(self) -> Iterator[Item]:
        return iter(self._made())

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return self._made()[index]


@dataclasses.dataclass(slots=True)
class Slice:
    """The part of one request that a step computes: tokens [start, start + count).

    Prefill, a chunk of a prompt, a decode and recompute are all slices. A slice is
    complete in itself, so that an executor needs no memory of requests.
    """

    request: Request
    start: int  # tokens of the request that are cached already
    count: int  # tokens to compute
    samples: bool  # whether the last token is computed, so that a new one comes out
    blocks: tuple[int, ...]  # KV blocks covering [0, start + count), and no others
    tokens: tuple[int, ...]  # `count` token ids; () if only lengths matter

    @property
    def sample_index(self) -> int:
        """Index of the generated token that comes out: 0 for the first."""
        return self.start + self.count - self.request.prompt_tokens

    @property
    def is_decode(self) -> bool:
        """Whether the slice is one token after cached tokens."""
        return self.count == 1 and self.start > 0


def last_tokens(chunks: Sequence[tuple[int, int]], most: int) -> int:
    """Count the parts of a step, from its end, that run as decodes: `most` at most.

    A decode does, and so may the last token of a chunked prompt: the computation is the
    same.

    Args:
      chunks: (start, count) of each part.
    """
    found = 0
    while found < min(most, len(chunks)):
        start, count = chunks[-1 - found]
        if count > 1 or not start:
            break
        found += 1
    return found


@dataclasses.dataclass(slots=True)
class StepLoad:
    """The amount of work in a step, as far as its duration depends on it."""

    chunks: tuple[tuple[int, int], ...]  # (start, count) of each prompt part
    decodes: int  # requests that decode one token each
    context: int  # tokens that the decodes attend to together, new ones included
    # KV blocks that the decodes attend to together: a block counts for each of them. 0
    # if only the context is known.
    decode_blocks: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens that the step computes."""
        return sum([count for _, count in self.chunks])

    @property
    def prompt_squares(self) -> int:
        """The sum over chunks of (start + count)^2 - start^2.

        Prompt attention grows with it. A whole prompt counts its length squared, and
        the chunks of a prompt add up to that.
        """
        return sum([(start + n) ** 2 - start**2 for start, n in self.chunks])

    def times(self, count: int) -> StepLoad:
        """Return the load of `count` such steps in one."""
        return StepLoad(
            self.chunks * count,
            self.decodes * count,
            self.context * count,
            self.decode_blocks * count,
        )

    @classmethod
    def of(cls, slices: Sequence[Slice]) -> StepLoad:
        """Return the load of given slices."""
        decodes = [part for part in slices if part.is_decode]
        return cls(
            tuple((p.start, p.count) for p in slices if not p.is_decode),
            len(decodes),
            sum(part.start + 1 for part in decodes),
            sum(len(part.blocks) for part in decodes),
        )


@dataclasses.dataclass(slots=True)
class Step:
    """One forward pass of one instance, or a span: several decode passes in a row.

    Each iteration of a span repeats the one before with every context a token longer.
    Only a cost model can run spans: they have no tokens.
    """

    id: int
    instance: int
    slices: Sequence[Slice]  # of the first iteration
    load: StepLoad  # of the first iteration
    iterations: int = 1

    @classmethod
    def of(cls, id: int, instance: int, slices: Sequence[Slice]) -> Step:
        """Make a step of given slices."""
        return cls(id, instance, slices, StepLoad.of(slices))

    @property
    def instances(self) -> tuple[int, ...]:
        """The instances it occupies or touches."""
        return (self.instance,)


@dataclasses.dataclass(slots=True)
class Transfer:
    """One request's KV, or a part of it, moves from one instance to another."""

    id: int
    request: Request
    src: int  # instance
    dst: int  # instance
    src_blocks: Sequence[int]
    dst_blocks: Sequence[int]  # as many as src_blocks, in the same order
    context: int  # tokens whose KV is in those blocks
    # The step that computes the last of these tokens: each layer group's KV leaves when
    # it is computed. 0: all KV is computed already.
    step: int = 0
    start: int = 0  # tokens of the request before those in the blocks

    @property
    def instances(self) -> tuple[int, ...]:
        """The instances it occupies or touches."""
        return (self.src, self.dst)


@dataclasses.dataclass(slots=True)
class TruncateSpan:
    """An order to end a span early. If all its ends were told, no Done follows."""

    work: int  # Step.id
    iterations: int  # in all, instead of the planned number


Task = Step | Transfer  # work that takes time
Work = Task | TruncateSpan


@dataclasses.dataclass(slots=True)
class Arrived:
    """A client sent a request."""

    request: Request


@dataclasses.dataclass(slots=True)
class Done:
    """A step or a transfer is complete. Sent once for each."""

    work: int  # Step.id or Transfer.id
    start_s: float  # when it began on its device or link
    end_s: float  # when its result was there
    tokens: tuple[int, ...] = ()  # step: one per sampling slice; () in simulation
    bytes: int = 0  # transfer: KV bytes moved
    ends_s: tuple[float, ...] = ()  # span: ends of iterations not reported before
    # Step: when it left each pipeline stage but the last. A stage takes steps in order,
    # each when it has left the stage before.
    stage_ends_s: tuple[float, ...] = ()


@dataclasses.dataclass(slots=True)
class StageFree:
    """A step has left the first pipeline stage, so another may start."""

    work: int  # Step.id


@dataclasses.dataclass(slots=True)
class Progress:
    """Iterations of a span are over, and it goes on."""

    work: int  # Step.id
    ends_s: tuple[float, ...]  # of the iterations not reported before; the last <= now


@dataclasses.dataclass(slots=True)
class Cancelled:
    """A client hung up."""

    request: int


@dataclasses.dataclass(slots=True)
class Down:
    """An instance is lost with all its KV; no Done of its work follows."""

    instance: int


@dataclasses.dataclass(slots=True)
class Up:
    """A lost instance is back, empty."""

    instance: int


@dataclasses.dataclass(slots=True)
class Straggle:
    """An instance becomes a straggler, or stops being one. Only for simulations."""

    instance: int
    factor: float  # on the durations of its steps from now on; 1 is its usual speed


Report = Done | StageFree  # told by a backend, which tells Progress when asked
Event = Arrived | Report | Progress | Cancelled | Down | Up | Straggle
