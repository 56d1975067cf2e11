"""The serving loop: arrivals, cancellations and faults in, timelines out."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence

from disagg_jax.control.backend import Backend
from disagg_jax.control.controller import Controller
from disagg_jax.errors import require
from disagg_jax.request import Request, Timeline
from disagg_jax.work import (
    Arrived,
    Cancelled,
    Down,
    Event,
    Progress,
    Straggle,
    Up,
    Work,
)

Intervention = tuple[float, Cancelled | Down | Straggle | Up]
Observer = Callable[[float, Sequence[Event], Sequence[Work]], None]
# (time in seconds, all timelines so far, those that ended in this turn) -> requests
# that arrive now.
Followers = Callable[[float, Sequence[Timeline], Sequence[Timeline]], Sequence[Request]]


def serve(
    controller: Controller,
    backend: Backend,
    requests: Iterable[Request],
    interventions: Iterable[Intervention] = (),
    observer: Observer | None = None,
    followers: Followers | None = None,
) -> list[Timeline]:
    """Serve `requests` to the end and return their timelines in arrival order.

    Args:
      interventions: (time in seconds, event) pairs to inject: cancellations, losses,
        stragglers.
      observer: called once per turn with the time, the events and the work decided on.
        The event log is such an observer.
      followers: called after each turn; the requests it returns arrive at once, but
        behind the work of the turn. A closed loop of clients is such a function.

    Raises:
      ValueError: on an impossible intervention, before anything is served.
    """
    timed: list[tuple[float, Event]] = [(r.arrival_s, Arrived(r)) for r in requests]
    for at_s, change in interventions:
        _check_intervention(at_s, change, len(controller.instances))
        timed.append((at_s, change))
    external = collections.deque(sorted(timed, key=lambda item: item[0]))
    asked: list[Event] = []

    def logged_progress(work: int) -> Sequence[float]:
        if ends_s := backend.progress(work):
            asked.append(Progress(work, tuple(ends_s)))
        return ends_s

    progress = backend.progress if observer is None else logged_progress
    while external or controller.in_flight:
        done = backend.wait(external[0][0] if external else math.inf)
        if not done and not external:
            raise RuntimeError(
                f"the backend lost {controller.in_flight} pieces of work: it waits for "
                "nothing, but they are not done"
            )
        now_s = backend.now_s()
        events: list[Event] = [*done]
        while external and external[0][0] <= now_s:
            events.append(external.popleft()[1])
        works = controller.step(now_s, events, progress)
        for event in events[len(done) :]:
            if isinstance(event, Down):
                backend.drop(event.instance)
            elif isinstance(event, Straggle):
                backend.slow(event.instance, event.factor)
        if observer is not None:
            observer(now_s, [*asked, *events], works)
            asked.clear()
        for work in works:
            backend.submit(work)
        if followers is not None:
            following = followers(now_s, controller.timelines, controller.ended)
            external.extendleft([(now_s, Arrived(r)) for r in reversed(following)])
    return controller.timelines


def _check_intervention(
    at_s: float, change: Cancelled | Down | Straggle | Up, instances: int
) -> None:
    require(math.isfinite(at_s), f"{change}: expected a finite time", at_s)
    if not isinstance(change, Cancelled):
        exists = 0 <= change.instance < instances
        require(exists, f"expected one of the {instances} instances", change)
    if isinstance(change, Straggle):
        valid = 0 < change.factor < math.inf
        require(valid, "slow: expected a finite factor > 0", change.factor)
