"""An engine's deployment by the seconds of its programs, without the engine."""

from __future__ import annotations

from disagg_jax.calibration.works import every_work
from disagg_jax.engine.executor import TimingExecutor
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.programs.shapes import StepShape
from disagg_jax.sim.cost.program_times import ProgramTimes
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Step


def without_engine(served: ServedDeployment) -> SimulatedDeployment:
    """Return `served` by the seconds of its programs alone.

    It decides as the engine does, down to the blocks that each request has: without
    tokens that end requests, its timelines are the engine's. It can be sent to another
    process. The timing must give work of equal programs equal durations, as a table
    does.

    Raises:
      ValueError: on the wall clock, where nothing is known before a run.
    """
    if served.timing is None:
        raise ValueError("timing: expected that of a virtual clock, got the wall clock")
    engine, timed = served.engine, TimingExecutor(served.engine, served.timing)
    steps: list[dict[StepShape, tuple[float, ...]]] = [{} for _ in engine.instances]
    transfers: dict[tuple[int, int, int, bool], Hop] = {}
    for work in every_work(engine, streams=served.streams):
        outcome = timed.run(work)
        durations_s = tuple(outcome.durations_s)
        if isinstance(work, Step):
            shape = engine.instances[work.instance].step_shape(work.slices)
            steps[work.instance][shape] = (*durations_s, *outcome.later_stages_s)
        else:
            key = (work.src, work.dst, len(work.src_blocks), work.step > 0)
            transfers[key] = Hop(durations_s, outcome.bytes)
    return SimulatedDeployment(
        deployment=engine.deployment,
        policies=served.policies,
        memory=engine.memory,
        cost=ProgramTimes(
            buckets=[instance.buckets for instance in engine.instances],
            block_tokens=[memory.block_tokens for memory in engine.memory],
            steps=steps,
            transfers=transfers,
        ),
        streams=served.streams,
        spans=False,
        counts_blocks=True,
        prefill_router=served.prefill_router,
        decode_router=served.decode_router,
    )
