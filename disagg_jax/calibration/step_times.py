"""The seconds of every program of an engine in a table: measured, or of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disagg_jax.calibration.profile_keys import EngineWork, StepKey, cost_of, key_of
from disagg_jax.calibration.timing import Progress, measure, time_alone, typical_s
from disagg_jax.calibration.works import every_work
from disagg_jax.engine.engine import Engine
from disagg_jax.sim.cost.measured import CalibratedProfile


def measure_step_times(
    engines: Sequence[Engine],
    repeats: int = 5,
    progress: Progress = lambda _: None,
    *,
    streams: bool = False,
) -> dict[str, float]:
    """Return the median seconds of every program that the deployments can need.

    A step runs once before each timed run, so that it finds its own data in the caches.

    Args:
      streams: whether KV leaves in parts while its prompt is computed.
    """
    works = {
        tuple(engine.part_keys(work)): EngineWork(engine, work)
        for engine in engines
        for work in every_work(engine, streams=streams)
    }
    found = measure(works, repeats, time_alone, progress, turns=1, runs=2)
    seconds: dict[str, float] = {}
    for keys, turns in found.items():
        last_s = typical_s([runs[-1:] for runs in turns])
        seconds.update(zip(keys, last_s, strict=True))
    return seconds


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
