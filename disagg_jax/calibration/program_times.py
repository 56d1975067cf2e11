"""The seconds of an engine's programs as a table that needs no engine."""

from __future__ import annotations

from disagg_jax.calibration.works import every_work
from disagg_jax.control.backend import Outcome
from disagg_jax.engine.executor import TimingExecutor
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.programs.shapes import StepShape
from disagg_jax.sim.timed_deployment import ProgramTimes, TimedDeployment
from disagg_jax.work import Step


def without_engine(served: ServedDeployment) -> TimedDeployment:
    """Return `served` by the seconds of its programs alone.

    Its timing must give work of equal programs equal durations, as a table does.

    Raises:
      ValueError: on the wall clock, where nothing is known before a run.
    """
    if served.timing is None:
        raise ValueError("timing: expected that of a virtual clock, got the wall clock")
    engine, timed = served.engine, TimingExecutor(served.engine, served.timing)
    steps: list[dict[StepShape, Outcome]] = [{} for _ in engine.instances]
    transfers: dict[tuple[int, int, int, bool], Outcome] = {}
    for work in every_work(engine, streams=served.streams):
        if isinstance(work, Step):
            shape = engine.instances[work.instance].step_shape(work.slices)
            steps[work.instance][shape] = timed.run(work)
        else:
            key = (work.src, work.dst, len(work.src_blocks), work.step > 0)
            transfers[key] = timed.run(work)
    buckets = [instance.buckets for instance in engine.instances]
    return TimedDeployment(
        deployment=engine.deployment,
        policies=served.policies,
        memory=engine.memory,
        times=ProgramTimes(buckets=buckets, steps=steps, transfers=transfers),
        streams=served.streams,
        prefill_router=served.prefill_router,
        decode_router=served.decode_router,
    )
