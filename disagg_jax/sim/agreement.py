"""Two runs of the same requests: where they differ, and whether that is the durations.

A simulation may differ from the engine because its durations do, or because different
durations made the controller decide differently. `retime` tells these apart: it gives
the engine's own decisions the simulator's durations. What changes by that is the cost
model's error; the rest is timing-dependent scheduling.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence

from disagg_jax.event_log import LoggedStep, LoggedTransfer, LoggedWork, read_turns
from disagg_jax.expect import expect
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.sim.cost import DeploymentCost
from disagg_jax.work import Arrived, Cut, Done, Event, StageFree, StepLoad, Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two runs decided alike, in steps and transfers of the first run."""

    decided: int
    shared: int  # that the second run has too, at whatever time
    before: int  # of each instance, before the first on which they differ; summed


def agreement(ours: Iterable[str], theirs: Iterable[str]) -> Agreement:
    """Compares two event logs of equal requests on the same deployment."""
    first, second = _decisions(ours), _decisions(theirs)
    counts = [
        collections.Counter(itertools.chain.from_iterable(found.values()))
        for found in (first, second)
    ]
    before = 0
    for instance, decided in first.items():
        pairs = zip(decided, second.get(instance, []), strict=False)
        same = [a == b for a, b in pairs]
        before += same.index(False) if False in same else len(same)
    return Agreement(
        decided=counts[0].total(), shared=(counts[0] & counts[1]).total(), before=before
    )


def _decisions(lines: Iterable[str]) -> dict[int, list[Hashable]]:
    """By instance what it was to do, in order; a transfer counts where it goes to."""
    found: dict[int, list[Hashable]] = collections.defaultdict(list)
    for _, _, works in read_turns(lines):
        for work in works:
            if isinstance(work, LoggedStep):
                found[work.instance].append((work.instance, *work.slices))
            elif isinstance(work, LoggedTransfer):
                found[work.dst].append((work.request, work.src, work.dst))
    return found


def step_load(step: LoggedStep) -> StepLoad:
    """What a step computed."""
    decodes = [start for _, start, count in step.slices if start and count == 1]
    chunks = [
        (start, count) for _, start, count in step.slices if not start or count > 1
    ]
    return StepLoad(tuple(chunks), len(decodes), sum(decodes) + len(decodes))


def retime(
    lines: Iterable[str], requests: Sequence[Request], cost: DeploymentCost
) -> list[Timeline]:
    """The decisions of a run with other durations.

    Whatever was decided in one turn starts when the events of that turn have happened,
    its stage or link is free, and what its requests were in before is over.

    Args:
      lines: the run's event log, without spans.
      requests: all of them; every one was served to the end.

    Returns:
      For each request its tokens' stamps; nothing else is filled in.
    """
    run = _Retimed({request.id: request for request in requests}, cost)
    for _, events, works in read_turns(lines):
        run.turn(events, works)
    return [
        Timeline(request=r, status=Status.FINISHED, token_s=run.token_s[r.id])
        for r in requests
    ]


class _Retimed:
    """Where everything is on the new timeline so far."""

    def __init__(self, requests: Mapping[int, Request], cost: DeploymentCost):
        self._requests, self._cost = requests, cost
        self.token_s: dict[int, list[float]] = {id: [] for id in requests}
        self._over_s: dict[int, float] = {}  # of each request: its last work
        self._free_s: dict[tuple[int, ...], float] = {}  # of each stage and link
        # Of each piece of work: when it left its first stage, and when it was done.
        self._ends_s: dict[int, tuple[float, float]] = {}

    def turn(self, events: Sequence[Event], works: Sequence[LoggedWork]) -> None:
        """Places what was decided because of `events`."""
        now_s = max((self._happened_s(event) for event in events), default=0.0)
        for work in works:
            if isinstance(work, LoggedStep):
                self._step(work, now_s)
            else:
                expect(not isinstance(work, Cut), "log: expected no spans", work)
                assert isinstance(work, LoggedTransfer)
                self._transfer(work, now_s)

    def _happened_s(self, event: Event) -> float:
        if isinstance(event, Arrived):
            return event.request.arrival_s
        if isinstance(event, StageFree):
            return self._ends_s[event.work][0]
        expect(isinstance(event, Done), "log: expected a run without losses", event)
        assert isinstance(event, Done)
        return self._ends_s[event.work][1]

    def _step(self, step: LoggedStep, now_s: float) -> None:
        expect(step.iterations == 1, "log: expected no spans", step)
        ids = [id for id, _, _ in step.slices]
        end_s = max([now_s, *(self._over_s.get(id, 0.0) for id in ids)])
        ends_s: list[float] = []
        stages_s = self._cost.stages_s(step.instance, step_load(step))
        for stage, time_s in enumerate(stages_s):
            end_s = self._use((step.instance, stage), end_s, time_s)
            ends_s.append(end_s)
        self._ends_s[step.id] = ends_s[0], end_s
        for id, start, count in step.slices:
            self._over_s[id] = end_s
            known = self._requests[id].prompt_tokens + len(self.token_s[id])
            if start + count == known:  # the last known token: a new one comes out
                self.token_s[id].append(end_s)

    def _transfer(self, work: LoggedTransfer, now_s: float) -> None:
        start_s = max(now_s, self._over_s.get(work.request, 0.0))
        request, ends = self._requests[work.request], (work.src, work.dst)
        hop = self._cost.hop(
            Transfer(work.id, request, *ends, (), (), work.context, work.step)
        )
        # Two numbers are a stage: a link has another name.
        end_s = self._use((-1, *ends), start_s, hop.duration_s * hop.parts)
        self._over_s[work.request] = end_s
        self._ends_s[work.id] = end_s, end_s

    def _use(self, resource: tuple[int, ...], start_s: float, time_s: float) -> float:
        """Takes `resource` as soon as it is free; when it is done."""
        end_s = max(start_s, self._free_s.get(resource, 0.0)) + time_s
        self._free_s[resource] = end_s
        return end_s
