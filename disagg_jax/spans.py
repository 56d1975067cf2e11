"""Spans: several decode iterations that were planned at once.

Whatever may change an instance's next plan ends its span with the iteration that is
going on, so that a run with spans is the run without them, only faster. How far a span
is, is asked when somebody looks at its instance: told of all of them, every event would
cost a visit to all instances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from disagg_jax.state import InFlight, InstanceState, StepInFlight
from disagg_jax.work import Cut, Work

# (Step.id) -> ends of the iterations of a span that are over and were not told before.
SpanProgress = Callable[[int], Sequence[float]]


def no_progress(work: int) -> Sequence[float]:
    """Tell of no progress: of spans that are not asked about."""
    return ()


class Spans:
    """The spans in flight that must end early, or are between two iterations.

    Args:
      in_flight: all work in flight, by id.
      end: takes a span out of flight that ends between two iterations.
    """

    def __init__(
        self, in_flight: Mapping[int, InFlight], end: Callable[[StepInFlight], None]
    ):
        self._in_flight, self._end = in_flight, end
        self.disturbed: list[StepInFlight] = []
        self.at_boundary: list[StepInFlight] = []  # an iteration ends right now
        self._now_s = 0.0
        self._progress: SpanProgress = no_progress
        self._gone_on = False  # in this turn those between two iterations went on

    def begin_turn(self, now_s: float, progress: SpanProgress) -> None:
        """Take note of the time, and of who tells how far a span is by then."""
        self._now_s, self._progress, self._gone_on = now_s, progress, False

    def catch_up(self, instance: InstanceState) -> None:
        """Bring what is known of an instance up to now, if a span goes on there."""
        flight = instance.step
        if flight is not None and flight.work.iterations > 1:
            if ends_s := self._progress(flight.work.id):
                self.progress(flight, self._now_s, ends_s)

    def progress(
        self, flight: StepInFlight, now_s: float, ends_s: Sequence[float]
    ) -> None:
        """Iterations of a span are over."""
        goes_on = ends_s[-1] < now_s
        flight.batch.advance(ends_s, goes_on or self._gone_on)
        if not (goes_on or self._gone_on):
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
        """Disturbs a span that has lost the blocks for its last iteration."""
        self.catch_up(instance)
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
        self._gone_on = True

    def _cut(self, flight: StepInFlight, works: list[Work]) -> None:
        """Ends a span with the iteration that is going on, or now if none is."""
        work, begun = flight.work, flight.batch.begun
        if begun < flight.until:
            works.append(Cut(work.id, work.iterations - (flight.until - begun)))
            flight.until = begun
        if flight in self.at_boundary:
            self.at_boundary.remove(flight)
            self._end(flight)
