"""The event log: everything the controller was told, and what it decided.

A replay of the events through a fresh controller must give the same decisions. That
checks a log, or a change to the scheduling code.
"""

from __future__ import annotations

import array
import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from disagg_jax.control.controller import Controller
from disagg_jax.formats import EVENT_LOG
from disagg_jax.request import Request, Sampling
from disagg_jax.work import (
    Arrived,
    Cancelled,
    Done,
    Down,
    Event,
    Progress,
    StageFree,
    Step,
    StepLoad,
    Straggle,
    TruncateSpan,
    Up,
    Work,
)

_PLAIN_EVENTS = {
    kind.__name__: kind for kind in (Cancelled, Down, Straggle, StageFree, Up)
}


@dataclasses.dataclass
class EventLog:
    """An observer for `serve` that keeps one JSON line per turn of the controller.

    The first line is the format number.
    """

    lines: list[str] = dataclasses.field(
        default_factory=lambda: [json.dumps(EVENT_LOG.write({}))]
    )

    def __call__(
        self, now_s: float, events: Sequence[Event], works: Sequence[Work]
    ) -> None:
        turn = {
            "now_s": now_s,
            "events": [_event_to_json(event) for event in events],
            "works": [_work_to_json(work) for work in works],
        }
        self.lines.append(json.dumps(turn, separators=(",", ":")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """The part of a `Step` that is logged."""

    id: int
    instance: int
    slices: Sequence[tuple[int, int, int]]  # request, start, count; of one iteration
    iterations: int
    decode_blocks: int = 0  # see `StepLoad`

    @property
    def instances(self) -> tuple[int, ...]:
        """The instances it occupies or touches."""
        return (self.instance,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggedTransfer:
    """The part of a `Transfer` that is logged."""

    id: int
    request: int
    src: int
    dst: int
    context: int
    step: int

    @property
    def instances(self) -> tuple[int, ...]:
        """The instances it occupies or touches."""
        return (self.src, self.dst)


LoggedWork = LoggedStep | LoggedTransfer | TruncateSpan


def read_turns(
    lines: Iterable[str],
) -> Iterator[tuple[float, list[Event], list[LoggedWork]]]:
    """Yield the turns of a log, each as (now_s, events, works)."""
    for turn in _turns(lines):
        yield (
            turn["now_s"],
            [_event_from_json(event) for event in turn["events"]],
            [_work_from_json(work) for work in turn["works"]],
        )


def replay(lines: Iterable[str], controller: Controller) -> Iterator[int]:
    """Feed the logged events to `controller`; yield each turn whose work differs."""
    for number, turn in enumerate(_turns(lines)):
        events = [_event_from_json(event) for event in turn["events"]]
        works = controller.step(turn["now_s"], events)
        if [_work_to_json(work) for work in works] != turn["works"]:
            yield number


def _turns(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the turns of a log, which follow the line with its format."""
    for number, line in enumerate(lines):
        if number == 0:
            EVENT_LOG.read(json.loads(line))
        else:
            yield json.loads(line)


def _event_to_json(event: Event) -> list[Any]:
    if isinstance(event, Arrived):
        fields = dataclasses.asdict(event.request)
        fields["stop_tokens"] = sorted(event.request.stop_tokens)
        return ["Arrived", fields]
    names = [field.name for field in dataclasses.fields(event)]
    return [type(event).__name__, *(getattr(event, name) for name in names)]


def _event_from_json(record: list[Any]) -> Event:
    kind, *values = record
    if kind == "Arrived":
        fields = dict(values[0])
        fields["sampling"] = Sampling(**fields["sampling"])
        fields["stop_tokens"] = frozenset(fields["stop_tokens"])
        if fields["prompt"] is not None:
            fields["prompt"] = tuple(fields["prompt"])
        return Arrived(Request(**fields))
    if kind == "Done":
        work, start_s, end_s, tokens, size, *ends_s = values
        return Done(work, start_s, end_s, tuple(tokens), size, *map(tuple, ends_s))
    if kind == "Progress":
        work, ends_s = values
        return Progress(work, tuple(ends_s))
    return _PLAIN_EVENTS[kind](*values)


def _work_to_json(work: Work) -> list[Any]:
    """Return a readable decision, with a checksum of its blocks and tokens."""
    if isinstance(work, Step):
        slices = [[part.request.id, part.start, part.count] for part in work.slices]
        details = [ids for part in work.slices for ids in (part.blocks, part.tokens)]
        decode_blocks = StepLoad.of(work.slices).decode_blocks
        span = [work.iterations, _checksum(details), decode_blocks]
        return ["Step", work.id, work.instance, slices, *span]
    if isinstance(work, TruncateSpan):
        return ["TruncateSpan", work.work, work.iterations]
    blocks = _checksum([work.src_blocks, work.dst_blocks])
    ends = [work.src, work.dst]
    size = [work.context, work.step, blocks]
    return ["Transfer", work.id, work.request.id, *ends, *size]


def _work_from_json(record: list[Any]) -> LoggedWork:
    kind, *values = record
    if kind == "Step":
        id, instance, slices, iterations, _, decode_blocks = values
        return LoggedStep(
            id=id,
            instance=instance,
            slices=[(request, start, count) for request, start, count in slices],
            iterations=iterations,
            decode_blocks=decode_blocks,
        )
    if kind == "TruncateSpan":
        return TruncateSpan(*values)
    id, request, src, dst, context, step, _ = values
    return LoggedTransfer(
        id=id, request=request, src=src, dst=dst, context=context, step=step
    )


def _checksum(parts: Iterable[Sequence[int]]) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(array.array("q", part).tobytes(), checksum)
    return checksum
