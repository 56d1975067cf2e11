"""What a step takes in serving, over what its program takes alone.

Alone a program follows itself, in serving others, and the controller: other caches are
warm. So after its programs were timed alone an engine serves some requests, and what
the steps of a kind took together, over what they should have, goes into the profile.

The role of the instance is left out: in five calibrations of m32 decodes of decode
instances took 6 % less to 3 % more than those of colocated ones, prefills of prefill
instances 3 % less to 3 % more (`reports/calibrations.txt`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from disagg_jax.calibration.machine_speed import Speedometer, choose_probes
from disagg_jax.calibration.profile_keys import StepKey, cost_of, key_of
from disagg_jax.control.backend import Executor, Outcome
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import run_alone
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.metrics import SLO
from disagg_jax.request import Request
from disagg_jax.search.capacity import capacity_rps
from disagg_jax.sim.cost.measured import CalibratedProfile, Layout
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Step, Task
from experiments.sweep.request_source import RequestSource

# Of the capacity, so that steps are neither empty nor as full as they can be.
_LOAD = 0.6


class Served(NamedTuple):
    """A step of a run."""

    layout: Layout
    kind: str  # of its program
    measured_s: float  # on all stages together
    alone_s: float  # what its program takes, on a machine as slow as it was then


def with_service(
    profile: CalibratedProfile, steps: Iterable[Served]
) -> CalibratedProfile:
    """`profile` with how much longer the steps of each kind took than alone."""
    sums: dict[tuple[Layout, str], tuple[float, float]] = {}
    for layout, kind, measured_s, alone_s in steps:
        before = sums.get((layout, kind), (0.0, 0.0))
        sums[layout, kind] = before[0] + measured_s, before[1] + alone_s
    factors: dict[Layout, dict[str, float]] = {}
    for (layout, kind), (measured_s, alone_s) in sorted(sums.items()):
        factors.setdefault(layout, {})[kind] = measured_s / alone_s
    changed = {
        layout: dataclasses.replace(times, in_service=factors.get(layout, {}))
        for layout, times in profile.layouts.items()
    }
    return dataclasses.replace(profile, layouts=changed)


def serve_each(
    servers: Sequence[ServedDeployment],
    source: RequestSource,
    profile: CalibratedProfile,
) -> Iterator[Served]:
    """The steps of a run of each system.

    Which program a step runs is known here, and is not guessed as in a simulation
    (`Buckets.guess_extent`): what a guess has wrong depends on the lengths, and is no
    matter of the machine. The pools hold garbage afterwards: probes write there,
    between the requests' steps.

    Args:
      servers: with live durations on the virtual clock.
      profile: of programs alone.
    """
    probes = choose_probes(server.engine for server in servers)
    for server in servers:
        speedometer = Speedometer(probes, lambda e, work: run_alone(e, work)[0])
        recorder = _Recorder(server.engine)
        rate_rps = _LOAD * _capacity_rps(server, profile, source(1.0, 0))
        observed = dataclasses.replace(
            server,
            around=lambda it, rec=recorder, meter=speedometer: meter.around(
                rec.around(it)
            ),
        )
        observed.run(source(rate_rps, 0))
        slowdown = speedometer.slowdown(profile)
        for step, (layout, program), measured_s in recorder.steps:
            alone_s = sum(profile.layouts[layout].stages_s(program))
            factor = slowdown.factor(step.load, step.id - 1)
            yield Served(layout, program.kind, measured_s, factor * alone_s)


class _Recorder:
    """Takes down what steps take."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.steps: list[tuple[Step, StepKey, float]] = []

    def around(self, executor: Executor) -> Executor:
        """The same executor, observed."""
        return _Observed(executor, self)

    def note(self, work: Task, outcome: Outcome) -> None:
        """`work` was done."""
        key = key_of(self._engine, work)
        if isinstance(work, Step) and isinstance(key, StepKey):
            measured_s = sum(outcome.durations_s) + sum(outcome.later_stages_s)
            self.steps.append((work, key, measured_s))


@dataclasses.dataclass(frozen=True)
class _Observed:
    executor: Executor
    recorder: _Recorder

    def run(self, work: Task) -> Outcome:
        outcome = self.executor.run(work)
        self.recorder.note(work, outcome)
        return outcome


def _capacity_rps(
    server: ServedDeployment, profile: CalibratedProfile, requests: Sequence[Request]
) -> float:
    simulated = SimulatedDeployment(
        deployment=server.deployment,
        policies=server.policies,
        memory=server.memory,
        cost=cost_of(profile, server.engine),
    )
    slo = SLO(ttft_s=math.inf, tpot_s=math.inf)
    return capacity_rps(simulated, requests, slo)
