"""The seconds of every program of an engine in a table: measured, or of a profile."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

from disagg_jax.calibration.profile_keys import EngineWork, StepKey, cost_of, key_of
from disagg_jax.calibration.timing import Turn, measure, time_alone
from disagg_jax.calibration.works import every_work
from disagg_jax.engine.engine import Engine
from disagg_jax.errors import require
from disagg_jax.progress import Progress, silent
from disagg_jax.sim.cost.measured import CalibratedProfile

# Step times are steady if at most this share of programs has medians in the two halves
# of the rounds that differ by more. A half needs some rounds for a median.
_UNSTEADY_SHARE, _UNSTEADY, _LEAST_ROUNDS = 0.1, 0.05, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The seconds of every program in each round of timing.

    Raises:
      ValueError: on a program without rounds.
    """

    rounds: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        for key, times_s in self.rounds.items():
            require(len(times_s) >= 1, f"{key}: expected a time", times_s)

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Return the median of each program."""
        return {key: statistics.median(each) for key, each in self.rounds.items()}

    @property
    def halves(self) -> tuple[StepTimes, StepTimes] | None:
        """Return the first and the second half of the rounds; None of a single one.

        They are halves in time, so that they differ if the machine's speed changed.
        """
        middle = min(map(len, self.rounds.values()), default=0) // 2
        if not middle:
            return None
        first = {key: each[:middle] for key, each in self.rounds.items()}
        second = {key: each[-middle:] for key, each in self.rounds.items()}
        return StepTimes(rounds=first), StepTimes(rounds=second)

    @property
    def unsteady(self) -> float | None:
        """Return the share of programs whose medians differ between the halves.

        None where there is one round only.
        """
        if self.halves is None:
            return None
        first, second = (half.seconds for half in self.halves)
        ratios = [second[key] / first[key] for key in first]
        far = [ratio for ratio in ratios if abs(math.log(ratio)) > _UNSTEADY]
        return len(far) / len(ratios)

    @property
    def is_steady(self) -> bool:
        """Return whether the halves agree within 5 % for 90 % of the programs."""
        return self.unsteady is not None and self.unsteady <= _UNSTEADY_SHARE


def measure_step_times(
    engines: Sequence[Engine],
    repeats: int = 16,
    progress: Progress = silent,
    *,
    streams: bool = False,
) -> StepTimes:
    """Time every program that the deployments can need, until the times are steady.

    A step runs once before each timed run, so that it finds its own data in the caches.

    Args:
      repeats: rounds at most; less than 6 are all taken.
      streams: whether KV leaves in parts while its prompt is computed.
    """
    works = {
        tuple(engine.part_keys(work)): EngineWork(engine, work)
        for engine in engines
        for work in every_work(engine, streams=streams)
    }
    found = measure(
        works,
        repeats,
        time_alone,
        progress,
        turns=1,
        runs=2,
        enough=_is_enough,
    )
    return _by_program(found)


def _is_enough(found: Mapping[tuple[str, ...], Sequence[Turn]]) -> bool:
    taken = min(map(len, found.values()), default=0)
    return taken >= _LEAST_ROUNDS and _by_program(found).is_steady


def _by_program(found: Mapping[tuple[str, ...], Sequence[Turn]]) -> StepTimes:
    """Return the last run of each turn, by the key of its part."""
    return StepTimes(
        rounds={
            key: [runs[-1][part] for runs in turns]
            for keys, turns in found.items()
            for part, key in enumerate(keys)
        }
    )


def step_times_of(profile: CalibratedProfile, engine: Engine) -> dict[str, float]:
    """Return what `measure_step_times` does for one engine, but from a profile.

    Raises:
      ValueError: on a layout, a pair of layouts or a block size without measurement.
    """
    cost_of(profile, engine)  # raises
    seconds: dict[str, float] = {}
    for work in every_work(engine):
        key = key_of(engine, work)
        if isinstance(key, StepKey):
            parts_s = profile.layouts[key.layout].stages_s(key.program)
        else:
            parts_s = (profile.transfers[key.src, key.dst].time_s(key.blocks),)
        seconds.update(zip(engine.part_keys(work), parts_s, strict=True))
    return seconds


def check_step_times(
    engine: Engine, step_times: Mapping[str, float], *, streams: bool = False
) -> None:
    """Raise ValueError if the table lacks a program that the deployment can need."""
    works = every_work(engine, streams=streams)
    needed = {key for work in works for key in engine.part_keys(work)}
    if missing := sorted(needed - step_times.keys()):
        raise ValueError(
            f"step times: expected entries for all {len(needed)} programs of "
            f"{engine.deployment}, but {len(missing)} are missing, such as "
            f"'{missing[0]}'; the table was taken for other buckets or deployments"
        )
