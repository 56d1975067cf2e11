"""Two runs of the same requests: where they differ, and whether that is the durations.

A simulation may differ from the engine because its durations do, or because of what the
controller decided and when. `MeasuredCost` tells these apart: a simulation with the
durations that the engine had, in place of those that a profile predicts. And the
machine may not have been as fast in the run as when the profile was taken: `Slowdown`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from disagg_jax.request import Request
from disagg_jax.runlog.event_log import LoggedStep, LoggedTransfer, read_turns
from disagg_jax.runlog.utilisation import Occupancy
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer


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
    context = sum(decodes) + len(decodes)
    return StepLoad(tuple(chunks), len(decodes), context, step.front)


def step_kind(load: StepLoad) -> str:
    """prefill (of whole prompts or parts of them), decode, or mixed."""
    if not load.chunks:
        return "decode"
    return "mixed" if load.decodes else "prefill"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slowdown:
    """How much longer steps took in a run than when they were measured.

    The machine's speed changes; so a run is in sections of equally many pieces of work,
    steps and transfers.
    """

    decode: Sequence[float] = (1.0,)  # in each section, of steps that only decode
    prompt: Sequence[float] = (1.0,)  # of steps with a prompt, or a part of one
    works: int = 1  # in a section; the last one goes on for ever

    def factor(self, load: StepLoad, work: int) -> float:
        """Of a step that is the `work`th piece of work of a run, from 0 on."""
        sections = self.prompt if load.chunks else self.decode
        return sections[min(work // self.works, len(sections) - 1)]

    def of(self, cost: DeploymentCost) -> DeploymentCost:
        """The durations on that machine, for one simulation without spans."""
        return _SlowedCost(cost, self)


class StepTime(NamedTuple):
    """A step of a run on one pipeline stage."""

    instance: int
    load: StepLoad
    measured_s: float
    predicted_s: float

    @property
    def kind(self) -> str:
        return step_kind(self.load)


def step_times(
    occupancy: Occupancy, cost: DeploymentCost, slowdown: Slowdown
) -> Iterator[StepTime]:
    """What every step of a run took, and what `cost` says it takes on that machine."""
    for use in occupancy.stages:
        load, instance = step_load(use.step), use.step.instance
        predicted_s = cost.stages_s(instance, load)[use.stage]
        predicted_s *= slowdown.factor(load, use.step.id - 1)
        yield StepTime(instance, load, use.end_s - use.start_s, predicted_s)


class _SlowedCost:
    """A `DeploymentCost`: that of `cost`, longer; transfers are as they were."""

    def __init__(self, cost: DeploymentCost, slowdown: Slowdown):
        self._cost, self._slowdown, self._works = cost, slowdown, itertools.count()

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        factor = self._slowdown.factor(load, next(self._works))
        return tuple(time_s * factor for time_s in self._cost.stages_s(instance, load))

    def decoder(self, instance: int) -> Decoder:
        raise ValueError("Slowdown: expected a simulation without spans")

    def hop(self, transfer: Transfer) -> Hop:
        next(self._works)
        return self._cost.hop(transfer)


class MeasuredCost:
    """The durations of a run, for a simulation of it that decides for itself.

    A step takes what `cost` predicts for it, times what the run's next step of its kind
    took on that stage over its own prediction; so do transfers, by their ends. The
    run's bias, its spread and its slow moments are in this, in their order, whatever is
    decided. At the end of the run they begin again; a kind that it lacks is predicted.

    It is a `DeploymentCost` for one simulation, without spans.
    """

    def __init__(self, cost: DeploymentCost, occupancy: Occupancy):
        """Takes the durations from `occupancy`, of a run without losses."""
        self._cost = cost
        ratios: dict[Hashable, list[float]] = collections.defaultdict(list)
        for use in occupancy.stages:
            load = step_load(use.step)
            predicted_s = cost.stages_s(use.step.instance, load)[use.stage]
            key = (use.step.instance, use.stage, step_kind(load))
            ratios[key].append((use.end_s - use.start_s) / predicted_s)
        for link in occupancy.links:
            hop = cost.hop(_transfer(link.transfer))
            predicted_s = hop.duration_s * hop.parts
            key = (link.transfer.src, link.transfer.dst)
            ratios[key].append((link.end_s - link.start_s) / predicted_s)
        self._next = {key: itertools.cycle(found) for key, found in ratios.items()}

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        kind, predicted = step_kind(load), self._cost.stages_s(instance, load)
        return tuple(
            time_s * self._ratio((instance, stage, kind))
            for stage, time_s in enumerate(predicted)
        )

    def decoder(self, instance: int) -> Decoder:
        raise ValueError("MeasuredCost: expected a simulation without spans")

    def hop(self, transfer: Transfer) -> Hop:
        hop = self._cost.hop(transfer)
        ratio = self._ratio((transfer.src, transfer.dst))
        return dataclasses.replace(hop, duration_s=hop.duration_s * ratio)

    def _ratio(self, key: Hashable) -> float:
        return next(self._next[key]) if key in self._next else 1.0


def _transfer(logged: LoggedTransfer) -> Transfer:
    """What was logged, for its cost: whose KV it was does not matter to that."""
    request = Request(
        id=logged.request, arrival_s=0.0, prompt_tokens=logged.context, max_tokens=1
    )
    ends = logged.src, logged.dst
    return Transfer(logged.id, request, *ends, (), (), logged.context, logged.step)
