"""How fast the machine is while something else runs on it.

A shared machine does not keep its speed: the same decode step of m32, alone on a pinned
core, took 3.2 ms, and 4.4 ms some minutes later. So a few programs, whose results
nobody needs, run now and then between the others; over what they took while a profile
was measured, they tell how much slower the machine is now, whatever the profile says of
other programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence

from disagg_jax.calibration.decision_agreement import Slowdown
from disagg_jax.calibration.profile_keys import Probe, StepKey, TimeParts, key_of
from disagg_jax.calibration.works import every_work
from disagg_jax.control.backend import Executor, Outcome
from disagg_jax.engine.engine import Engine
from disagg_jax.programs import StepShape
from disagg_jax.sim.cost.measured import CalibratedProfile, Layout
from disagg_jax.work import Task

# One probe of each kind for so many pieces of other work: about a tenth of the time.
_EVERY = 60
# How many probes of a kind, of the small and the large one in turn, tell the speed at a
# time: one by itself says little, and slow moments of the machine last for seconds.
_TOGETHER = 6


def choose_probes(engines: Iterable[Engine]) -> dict[StepKey, Probe]:
    """Of each kind of program that an engine has, one small and one large."""
    chosen: dict[StepKey, Probe] = {}
    for engine in engines:
        kinds: dict[str, dict[StepKey, Probe]] = {}
        for work in every_work(engine):
            key = key_of(engine, work)
            if isinstance(key, StepKey):
                kinds.setdefault(key.program.kind, {})[key] = Probe(engine, work)
        for probes in kinds.values():
            keys = list(probes)
            for key in (keys[len(keys) // 3], keys[2 * len(keys) // 3]):
                chosen[key] = probes[key]
    return chosen


class Speedometer:
    """Runs probes between other work.

    Attributes:
      times_s: by kind of program, which probe ran and what it took, in all its parts
        together; one after the other.
    """

    def __init__(self, probes: Mapping[StepKey, Probe], time_parts: TimeParts):
        self._probes, self._time_parts = probes, time_parts
        kinds: dict[str, list[StepKey]] = {}
        for key in probes:
            kinds.setdefault(key.program.kind, []).append(key)
        self.times_s: dict[str, list[tuple[StepKey, float]]] = {k: [] for k in kinds}
        self._turns = {kind: itertools.cycle(keys) for kind, keys in kinds.items()}
        self._works = itertools.count(1)

    def tick(self) -> None:
        """Runs a probe of each kind if it is time to; called before other work."""
        if next(self._works) % _EVERY:
            return
        for kind, turn in self._turns.items():
            key = next(turn)
            # The first time it finds the caches cold, unlike most steps.
            self._time_parts(*self._probes[key])
            time_s = sum(self._time_parts(*self._probes[key]))
            self.times_s[kind].append((key, time_s))

    def around(self, executor: Executor) -> Executor:
        """The same executor, with probes between its work."""
        return _Interspersed(executor, self)

    def medians_s(self) -> dict[Layout, dict[StepShape, float]]:
        """By layout and program."""
        times: dict[StepKey, list[float]] = {}
        for key, time_s in itertools.chain(*self.times_s.values()):
            times.setdefault(key, []).append(time_s)
        found: dict[Layout, dict[StepShape, float]] = {}
        for (layout, program), each in times.items():
            found.setdefault(layout, {})[program] = statistics.median(each)
        return found

    def slowdown(self, profile: CalibratedProfile) -> Slowdown:
        """Of the machine since `profile` was measured; 1 where that cannot be told.

        What probes took is held against their medians then, as the profile has medians;
        their means count, since what steps take adds up, and slow moments with it.
        """
        found: dict[str, list[list[float]]] = {"decode": [], "prompt": []}
        for kind, times in self.times_s.items():
            ratios = [
                time_s / then_s
                for (layout, program), time_s in times
                if (then_s := _then_s(profile, layout, program))
            ]
            if ratios:
                found["decode" if kind == "decode" else "prompt"].append(ratios)
        sections = {
            name: _means([statistics.fmean(each) for each in zip(*kinds, strict=False)])
            for name, kinds in found.items()
            if kinds
        }
        return Slowdown(works=_EVERY, **sections)


def _then_s(
    profile: CalibratedProfile, layout: Layout, program: StepShape
) -> float | None:
    times = profile.layouts.get(layout)
    return times.probes.get(program) if times else None


def _means(ratios: Sequence[float]) -> list[float]:
    """For each of `ratios` the mean of those around it."""
    half = _TOGETHER // 2
    return [
        statistics.fmean(ratios[max(0, i - half) : i + half])
        for i in range(1, len(ratios) + 1)
    ]


@dataclasses.dataclass(frozen=True)
class _Interspersed:
    executor: Executor
    speedometer: Speedometer

    def run(self, work: Task) -> Outcome:
        self.speedometer.tick()
        return self.executor.run(work)
