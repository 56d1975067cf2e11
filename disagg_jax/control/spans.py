"""Spans: several decode iterations planned at once.

An event that may change an instance's next plan ends its span with the iteration that
is going on. So a run with spans equals the run without them, only faster. The progress
of a span is read when its instance is looked at: progress told at every event would
cost a visit to all instances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from disagg_jax.control.instance_state import InFlight, InstanceState, StepInFlight
from disagg_jax.work import TruncateSpan, Work

# (Step.id) -> ends of a span's iterations that are over and were not told before.
SpanProgress = Callable[[int], Sequence[float]]


def no_progress(work: int) -> Sequence[float]:
    """Return no ends: for a controller without spans to ask about."""
    return ()


class Spans:
    """The spans in flight that must end early, or are between two iterations.

    Attributes:
      disturbed: spans that must end early.
      at_boundary: spans with an iteration that ends right now.
      now_s: time of this turn.
      progress_of: tells how far a span is at that time.
      gone_on: whether the spans at a boundary went on in this turn. A span that reaches
        its boundary later in the turn goes on at once.

    Args:
      in_flight: all work in flight, by id.
      end: takes a span that ends between two iterations out of flight.
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
        """Bring the record of an instance up to now, if a span runs there."""
        flight = instance.step
        if flight is not None and flight.work.iterations > 1:
            if ends_s := self.progress_of(flight.work.id):
                self.progress(flight, self.now_s, ends_s)

    def progress(
        self, flight: StepInFlight, now_s: float, ends_s: Sequence[float]
    ) -> None:
        """Advance a span by the iterations that ended at `ends_s`."""
        goes_on = ends_s[-1] < now_s
        flight.batch.advance(ends_s, goes_on or self.gone_on)
        if not (goes_on or self.gone_on):
            self.at_boundary.append(flight)

    def disturb(self, instance: InstanceState) -> None:
        """Mark the span of an instance to end early: its next plan may change."""
        flight = instance.step
        if flight is None or flight.work.iterations == 1:
            return
        self.catch_up(instance)
        if not flight.cut:
            flight.cut = True
            self.disturbed.append(flight)

    def check(self, instance: InstanceState) -> None:
        """Disturb a span, up to date, that no longer has blocks to its planned end."""
        flight = instance.step
        if flight is not None and flight.work.iterations > 1:
            left = flight.until - flight.batch.begun
            if not flight.batch.fits(left, instance.blocks.free):
                self.disturb(instance)

    def cut(self, works: list[Work]) -> None:
        """End the disturbed spans that did not end by themselves."""
        for flight in self.disturbed:
            if flight.work.id in self._in_flight:
                self._cut(flight, works)
        self.disturbed.clear()

    def go_on(self, instances: Sequence[InstanceState], works: list[Work]) -> None:
        """Reserve blocks for the next iteration of spans at a boundary, or end them."""
        for flight in list(self.at_boundary):
            if flight.batch.fits(1, instances[flight.work.instance].blocks.free):
                flight.batch.reserve()
            else:
                self._cut(flight, works)
        self.at_boundary.clear()

    def _cut(self, flight: StepInFlight, works: list[Work]) -> None:
        """End a span with the iteration that is going on, or now if none is."""
        work, begun = flight.work, flight.batch.begun
        if begun < flight.until:
            works.append(
                TruncateSpan(work.id, work.iterations - (flight.until - begun))
            )
            flight.until = begun
        if flight in self.at_boundary:
            self.at_boundary.remove(flight)
            self._end(flight)
