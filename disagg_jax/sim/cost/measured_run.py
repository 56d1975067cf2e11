"""The durations of a run, for a simulation of it that makes its own decisions.

A simulation may differ from the engine in its durations, or in what the controller
decided and when. With the durations of the engine's run in place of a profile's only
the second difference is left.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Hashable

from disagg_jax.request import Request
from disagg_jax.runlog.event_log import LoggedStep, LoggedTransfer
from disagg_jax.runlog.utilisation import Occupancy
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer


def step_load(step: LoggedStep) -> StepLoad:
    """Return the load of a logged step."""
    decodes = [start for _, start, count in step.slices if start and count == 1]
    chunks = [
        (start, count) for _, start, count in step.slices if not start or count > 1
    ]
    context = sum(decodes) + len(decodes)
    return StepLoad(tuple(chunks), len(decodes), context, step.decode_blocks)


def step_kind(load: StepLoad) -> str:
    """Return prefill (of whole prompts or of parts), decode or mixed."""
    if not load.chunks:
        return "decode"
    return "mixed" if load.decodes else "prefill"


class MeasuredCost:
    """Replay a run's measured-to-predicted ratios in a simulation of the run.

    A step takes the time that `cost` predicts, times the ratio of the run's next step
    of its kind on that stage. A transfer takes the ratio of the next transfer between
    its two instances. The ratios hold the run's bias, its spread and its slow moments
    in their order, whatever the simulation decides. After the last ratio the first
    follows; a kind that the run lacks takes the predicted time.

    It is a `DeploymentCost` for one simulation without spans.
    """

    def __init__(self, cost: DeploymentCost, occupancy: Occupancy):
        """Take the ratios from `occupancy`, of a run without losses."""
        self._cost = cost
        ratios: dict[Hashable, list[float]] = collections.defaultdict(list)
        for use in occupancy.stages:
            load = step_load(use.step)
            predicted_s = cost.stages_s(use.step.instance, load)[use.stage]
            key = (use.step.instance, use.stage, step_kind(load))
            ratios[key].append((use.end_s - use.start_s) / predicted_s)
        for link in occupancy.links:
            hop = cost.hop(_transfer(link.transfer))
            key = (link.transfer.src, link.transfer.dst)
            ratios[key].append((link.end_s - link.start_s) / hop.duration_s)
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
        parts_s = tuple(part_s * ratio for part_s in hop.parts_s)
        return dataclasses.replace(hop, parts_s=parts_s)

    def _ratio(self, key: Hashable) -> float:
        return next(self._next[key]) if key in self._next else 1.0


def _transfer(logged: LoggedTransfer) -> Transfer:
    """Return a transfer of equal cost, whose request may be any."""
    request = Request(
        id=logged.request, arrival_s=0.0, prompt_tokens=logged.context, max_tokens=1
    )
    ends = logged.src, logged.dst
    return Transfer(logged.id, request, *ends, (), (), logged.context, logged.step)
