"""Spans: several decode iterations that were planned at once.

Whatever may change an instance's next plan ends its span with the iteration that is
going on, so that a run with spans is the run without them, only faster. How far a span
is, is asked when somebody looks at its instance: told of all of them, every event would
cost a visit to all instances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from disagg_jax.control.state import InFlight, InstanceState, StepInFlight
from disagg_jax.work import Cut, Work

# (Step.id) -> ends of the iterations of a span that are over and were not told before.
SpanProgress = Callable[[int], Sequence[float]]


def no_progress(work: int) -> Sequence[float]:
    """Tell of no progress: of spans that are not asked about."""
    return ()


class Spans:
    """The spans in flight that must end early, or are between two iterations.

    Attributes:
      disturbed: those that must end early.
      at_boundary: those of which an iteration ends right now.
      now_s: of this turn.
      progress_of: who tells how far a span is by then.
      gone_on: whether, in this turn, those at a boundary went on: one that is looked at
        later goes on at once.

    Args:
      in_flight: all work in flight, by id.
      end: takes a span out of flight that ends between two iterations.
    """

    def __init__(
        self, in_flight: Mapping[int, InFlight], end: Callable[[StepInFlight], None]
    ):
        self._in_flight, self._end = in_flight, end
        self.disturbed: list[StepInFlight] = []
        self.at_boundary: list[StepInFlight] = []
        self.now_s = 0.0
        self.progress_of: SpanProgress = no_progress
        self.gone_on = False

    def catch_up(self, instance: InstanceState) -> None:
        """Bring what is known of an instance up to now, if a span goes on there."""
        flight = instance.step
        if flight is not None and flight.work.iterations > 1:
            if ends_s := self.progress_of(flight.work.id):
                self.progress(flight, self.now_s, ends_s)

    def progress(
        self, flight: StepInFlight, now_s: float, ends_s: Sequence[float]
    ) -> None:
        """Iterations of a span are over."""
        goes_on = ends_s[-1] < now_s
        flight.batch.advance(ends_s, goes_on or self.gone_on)
        if not (goes_on or self.gone_on):
            self.at_boundary.append(flight)

    def disturb(self, instance: InstanceState | None) -> None:
        """Something happened at `instance` that may change its next plan."""
        flight = instance.step if instance else None
        if instance is None or flight is None or flight.work.iterations == 1:
            return
        self.catch_up(instance)
        if not flight.cut:
            flight.cut = True
            self.disturbed.append(flight)

    def check(self, instance: InstanceState) -> None:
        """Disturb a span, up to date, that lost the blocks for its last iteration."""
        flight = instance.step
        if flight is not None and flight.work.iterations > 1:
            left = flight.until - flight.batch.begun
            if not flight.batch.fits(left, instance.blocks.free):
                self.disturb(instance)

    def cut(self, works: list[Work]) -> None:
        """Ends what was disturbed, if it did not end by itself."""
        for flight in self.disturbed:
            if flight.work.id in self._in_flight:
                self._cut(flight, works)
        self.disturbed.clear()

    def go_on(self, instances: Sequence[InstanceState], works: list[Work]) -> None:
        """Spans between two iterations reserve blocks for the next one, or end."""
        for flight in list(self.at_boundary):
            if flight.batch.fits(1, instances[flight.work.instance].blocks.free):
                flight.batch.charge()
            else:
                self._cut(flight, works)
        self.at_boundary.clear()

    def _cut(self, flight: StepInFlight, works: list[Work]) -> None:
        """Ends a span with the iteration that is going on, or now if none is."""
        work, begun = flight.work, flight.batch.begun
        if begun < flight.until:
            works.append(Cut(work.id, work.iterations - (flight.until - begun)))
            flight.until = begun
        if flight in self.at_boundary:
            self.at_boundary.remove(flight)
            self._end(flight)
