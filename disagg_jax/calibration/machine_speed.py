"""How fast a shared machine is in a run, over its speed while a profile was measured.

A shared machine does not keep its speed: the same decode step of m32, alone on a pinned
core, took 3.2 ms, and 4.4 ms some minutes later. So a few programs with no use for
their results, the probes, run now and then between other work. Their times over their
times of the calibration tell how much slower the machine is, whatever the profile says
of other programs. On a machine of its own an engine needs none of this: without probes
(`experiments.calibrate --nospeed_probes`) every slowdown is 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

from disagg_jax.calibration.profile_keys import EngineWork, StepKey, TimeParts
from disagg_jax.calibration.timing import grid, time_alone
from disagg_jax.control.backend import Executor, Outcome
from disagg_jax.deployment import Parallelism
from disagg_jax.engine.engine import Engine
from disagg_jax.programs import StepShape
from disagg_jax.sim.cost.interface import Decoder, DeploymentCost
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Task, Transfer

# One probe of each kind for so many pieces of other work: about a tenth of the time.
_EVERY = 60
# Probes of a kind, small and large in turn, that tell the speed at a time: a single one
# says little, and slow moments of the machine last for seconds.
_TOGETHER = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slowdown:
    """The times of steps in a run over those of the calibration.

    The machine's speed changes, so a run is in sections of equally many pieces of work:
    steps and transfers. The last section goes on for ever.
    """

    decode: Sequence[float] = (1.0,)  # by section, for steps that only decode
    prompt: Sequence[float] = (1.0,)  # for steps with a prompt, or a part of one
    works: int = 1  # in a section

    def factor(self, load: StepLoad, work: int) -> float:
        """Return the factor of a step that is the `work`th piece of work, from 0 on."""
        sections = self.prompt if load.chunks else self.decode
        return sections[min(work // self.works, len(sections) - 1)]

    def of(self, cost: DeploymentCost) -> DeploymentCost:
        """Return the durations on that machine, for one simulation without spans."""
        return _SlowedCost(cost, self)


class _SlowedCost:
    """A `DeploymentCost` with longer steps than `cost`, and equal transfers."""

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


def choose_probes(engines: Iterable[Engine]) -> dict[StepKey, EngineWork]:
    """Return a small and a large program of each kind that an engine has."""
    chosen: dict[StepKey, EngineWork] = {}
    for engine in engines:
        works = grid([engine])
        kinds: dict[str, list[StepKey]] = {}
        for key in works:
            if isinstance(key, StepKey):
                kinds.setdefault(key.program.kind, []).append(key)
        for keys in kinds.values():
            for key in (keys[len(keys) // 3], keys[2 * len(keys) // 3]):
                chosen[key] = works[key]
    return chosen


class SpeedProbe:
    """Runs probes between other work.

    Attributes:
      times_s: by kind of program, each probe that ran and its time, all parts together.
    """

    def __init__(
        self, probes: Mapping[StepKey, EngineWork], time_parts: TimeParts = time_alone
    ):
        self._probes, self._time_parts = probes, time_parts
        kinds: dict[str, list[StepKey]] = {}
        for key in probes:
            kinds.setdefault(key.program.kind, []).append(key)
        self.times_s: dict[str, list[tuple[StepKey, float]]] = {k: [] for k in kinds}
        self._turns = {kind: itertools.cycle(keys) for kind, keys in kinds.items()}
        self._works = itertools.count(1)

    def tick(self) -> None:
        """Run a probe of each kind if it is time to; to be called before other work."""
        if next(self._works) % _EVERY:
            return
        for kind, turn in self._turns.items():
            key = next(turn)
            # The first run finds the caches cold, unlike most steps.
            self._time_parts(*self._probes[key])
            time_s = sum(self._time_parts(*self._probes[key]))
            self.times_s[kind].append((key, time_s))

    def around(self, executor: Executor) -> Executor:
        """Return the same executor, with probes between its work."""
        return _Interspersed(executor, self)

    def medians_s(self) -> dict[tuple[Parallelism, StepShape], float]:
        """Return the median time of each probe."""
        times: dict[tuple[Parallelism, StepShape], list[float]] = {}
        for key, time_s in itertools.chain(*self.times_s.values()):
            times.setdefault(key, []).append(time_s)
        return {key: statistics.median(each) for key, each in times.items()}

    def slowdown(self, profile: CalibratedProfile) -> Slowdown:
        """Divide probe times by the profile's medians; 1 where it has none.

        Average the ratios rather than take their median: step times add up, so slow
        moments count.
        """
        found: dict[str, list[list[float]]] = {"decode": [], "prompt": []}
        for kind, times in self.times_s.items():
            ratios = [
                time_s / profile.probes[key]
                for key, time_s in times
                if key in profile.probes
            ]
            if ratios:
                found["decode" if kind == "decode" else "prompt"].append(ratios)
        sections = {
            name: _means([statistics.fmean(each) for each in zip(*kinds, strict=False)])
            for name, kinds in found.items()
            if kinds
        }
        return Slowdown(works=_EVERY, **sections)


def _means(ratios: Sequence[float]) -> list[float]:
    """Return for each of `ratios` the mean of those around it."""
    half = _TOGETHER // 2
    return [
        statistics.fmean(ratios[max(0, i - half) : i + half])
        for i in range(1, len(ratios) + 1)
    ]


@dataclasses.dataclass(frozen=True)
class _Interspersed:
    executor: Executor
    speed_probe: SpeedProbe

    def run(self, work: Task) -> Outcome:
        self.speed_probe.tick()
        return self.executor.run(work)
