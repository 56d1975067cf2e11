"""Backends and executors: they do the work that the controller decides on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from disagg_jax.work import Report, Task, Work


@dataclasses.dataclass(slots=True)
class Outcome:
    """The result of one piece of work that was run alone."""

    # Of each iteration, or of each part of a transfer that goes along with a step. May
    # be an iterator that makes them when they are needed.
    durations_s: Iterable[float]
    tokens: tuple[int, ...] = ()  # step: one per sampling slice; () in simulation
    bytes: int = 0  # transfer: KV bytes moved
    later_stages_s: Sequence[float] = ()  # step: on pipeline stages after the first
    link: tuple[int, ...] = ()  # transfer: the wire; () is one for each (src, dst)
    shared: bool = False  # whether transfers share the wire instead of taking turns


class Executor(Protocol):
    """Does one piece of work from start to end: a cost model, or a real engine."""

    def run(self, work: Task) -> Outcome:
        """Run `work` and return its result."""
        ...


class Backend(Protocol):
    """Owns time and order. Work is submitted, completions come back."""

    def now_s(self) -> float:
        """Return the seconds since the start of the run."""
        ...

    def submit(self, work: Work) -> None:
        """Start `work` when its device or link is free; a TruncateSpan at once."""
        ...

    def wait(self, until_s: float) -> list[Report]:
        """Return the next completions, [] if there are none until `until_s`.

        With no work submitted and `until_s` infinite it returns [] at once.
        """
        ...

    def progress(self, work: int) -> Sequence[float]:
        """Return the ends of iterations of span `work` up to now, each only once."""
        ...

    def slow(self, instance: int, factor: float) -> None:
        """Make steps of `instance` that start from now on take `factor` as long.

        Raises:
          ValueError: if time is not simulated.
        """
        ...

    def drop(self, instance: int) -> None:
        """Forget all work that touches `instance`: no Done follows for it.

        Other requests may get its blocks at once, so it may write nothing after work
        that is submitted later.
        """
        ...
