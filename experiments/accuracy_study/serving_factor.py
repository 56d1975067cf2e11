"""The time of steps in serving over the time of their programs alone.

Alone a program follows itself; in serving it follows others, and the controller runs in
between, so other data is in the caches. After its programs were timed alone an engine
therefore serves some requests. The profile also stores, per kind of step, total
measured time over total predicted time.

The role of the instance is left out: in five calibrations of m32 decodes of decode
instances took 6 % less to 3 % more than those of colocated ones, prefills of prefill
instances 3 % less to 3 % more (`reports/calibrations.txt`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from disagg_jax.calibration.machine_speed import SpeedProbe, choose_probes
from disagg_jax.calibration.profile_keys import StepKey, cost_of, key_of
from disagg_jax.control.backend import Executor, Outcome
from disagg_jax.deployment import Parallelism
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.metrics import SLO
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.search.capacity import capacity_rps
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Step, Task
from experiments.sweep.request_source import RequestSource

# Of the capacity, so that steps are neither empty nor as full as they can be.
_LOAD = 0.6


class ServedStep(NamedTuple):
    """A step of a run."""

    layout: Parallelism
    kind: str  # of its program
    measured_s: float  # on all stages together
    alone_s: float  # of its program, on a machine as slow as it was then


def with_serving_factors(
    profile: CalibratedProfile, steps: Iterable[ServedStep]
) -> CalibratedProfile:
    """Return `profile` with the factors of each layout and kind of step."""
    sums: dict[tuple[Parallelism, str], tuple[float, float]] = {}
    for layout, kind, measured_s, alone_s in steps:
        before = sums.get((layout, kind), (0.0, 0.0))
        sums[layout, kind] = before[0] + measured_s, before[1] + alone_s
    factors: dict[Parallelism, dict[str, float]] = {}
    for (layout, kind), (measured_s, alone_s) in sorted(sums.items()):
        factors.setdefault(layout, {})[kind] = measured_s / alone_s
    changed = {
        layout: dataclasses.replace(times, serving_factor=factors.get(layout, {}))
        for layout, times in profile.layouts.items()
    }
    return dataclasses.replace(profile, layouts=changed)


def serve_each(
    servers: Sequence[ServedDeployment],
    source: RequestSource,
    profile: CalibratedProfile,
    progress: Progress = silent,
    stop: Stop = never,
) -> Iterator[list[ServedStep]]:
    """Serve requests on each system and yield its steps, until there is to be a stop.

    The program of each step is known here, while a simulation guesses it
    (`Buckets.guess_blocks`): errors of the guess depend on the lengths of requests and
    say nothing of the machine. The pools hold garbage afterwards: probes write there,
    between the requests' steps. Probes run if the profile has times of probes.

    Args:
      servers: with live durations on the virtual clock.
      profile: of programs alone.
      stop: asked before each system.
    """
    engines = [server.engine for server in servers]
    probes = choose_probes(engines) if profile.probes else {}
    slo = SLO(ttft_s=math.inf, tpot_s=math.inf)
    for i, server in enumerate(servers):
        if stop():
            return
        progress("systems that serve", i, len(servers), "")
        probe = SpeedProbe(probes)
        steps: list[tuple[Step, StepKey, float]] = []
        simulated = SimulatedDeployment(
            deployment=server.deployment,
            policies=server.policies,
            memory=server.memory,
            cost=cost_of(profile, server.engine),
        )
        rate_rps = _LOAD * capacity_rps(simulated, source(1.0), slo)
        observed = dataclasses.replace(
            server,
            around=lambda executor, probe=probe, engine=server.engine, steps=steps: (
                probe.around(_Recorder(executor, engine, steps))
            ),
        )
        observed.run(source(rate_rps))
        slowdown = probe.slowdown(profile)
        found: list[ServedStep] = []
        for step, (layout, program), measured_s in steps:
            alone_s = sum(profile.layouts[layout].stages_s(program))
            alone_s *= slowdown.factor(step.load, step.id - 1)
            found.append(ServedStep(layout, program.kind, measured_s, alone_s))
        yield found


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """An `Executor` that notes each step, its key and its time."""

    executor: Executor
    engine: Engine
    steps: list[tuple[Step, StepKey, float]]

    def run(self, work: Task) -> Outcome:
        outcome = self.executor.run(work)
        key = key_of(self.engine, work)
        if isinstance(work, Step) and isinstance(key, StepKey):
            measured_s = sum(outcome.durations_s) + sum(outcome.later_stages_s)
            self.steps.append((work, key, measured_s))
        return outcome
