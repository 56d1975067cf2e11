"""Whatever executes what the controller decides: backends and executors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from disagg_jax.work import Report, Task, Work


@dataclasses.dataclass(slots=True)
class Outcome:
    """What came of one piece of work that was run alone."""

    # Of each iteration, or of each part of a transfer that goes along with a step; may
    # be made when it is needed.
    durations_s: Iterable[float]
    tokens: tuple[int, ...] = ()  # step: one per sampling slice; () in simulation
    bytes: int = 0  # transfer: KV bytes moved
    later_stages_s: Sequence[float] = ()  # step: on the pipeline stages after the first
    link: tuple[int, ...] = ()  # transfer: the wire; () is one for each (src, dst)
    shared: bool = False  # transfer: all on that wire at once, instead of in turn


class Executor(Protocol):
    """Does one piece of work from start to end: a cost model, or a real engine."""

    def run(self, work: Task) -> Outcome: ...


class Backend(Protocol):
    """Owns time and order. Work is submitted, completions come back."""

    def now_s(self) -> float:
        """Seconds since the start of the run."""
        ...

    def submit(self, work: Work) -> None:
        """Starts `work` as soon as its device or link is free; a Cut at once."""
        ...

    def wait(self, until_s: float) -> list[Report]:
        """Returns the next completions; none if there are none until `until_s`.

        With nothing submitted and `until_s` infinite it returns [] at once.
        """
        ...

    def progress(self, work: int) -> Sequence[float]:
        """Return when iterations of span `work` ended, of those not told before.

        Those that end later than now are not told yet.
        """
        ...

    def slow(self, instance: int, factor: float) -> None:
        """Lets the steps of `instance` that start from now on take `factor` as long.

        Raises:
          ValueError: where time is not simulated.
        """
        ...

    def drop(self, instance: int) -> None:
        """Forgets all work that touches `instance`: no Done follows for it.

        The blocks it was to write may be given to others at once, so nothing of it may
        be written after work that is submitted later.
        """
        ...
