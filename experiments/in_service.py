"""What a step takes in serving, over what its program takes alone.

Alone a program follows itself, in serving others, and the controller: other caches are
warm. So after its programs were timed alone an engine serves some requests, and what
the steps of a kind took together, over what they should have, goes into the profile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from disagg_jax.engine.executor import run_alone
from disagg_jax.metrics import SLO
from disagg_jax.occupancy import read_occupancy
from disagg_jax.request import Request
from disagg_jax.sim.agreement import StepTime, step_times
from disagg_jax.sim.calibrated import CalibratedCost, CalibratedProfile, Layout
from disagg_jax.sim.capacity import capacity_rps
from disagg_jax.sim.simulate import SimulatedDeployment
from experiments.profiled import cost_of, layouts
from experiments.request_source import RequestSource
from experiments.serving import Server
from experiments.speed import Speedometer, choose_probes

# Of the capacity, so that steps are neither empty nor as full as they can be.
_LOAD = 0.6


class Served(NamedTuple):
    """A step of a run, and whose program it was."""

    layout: Layout
    kind: str  # of its program
    time: StepTime  # predicted from what programs take alone


def with_service(
    profile: CalibratedProfile, steps: Iterable[Served]
) -> CalibratedProfile:
    """`profile` with how much longer the steps of each kind took than alone."""
    sums: dict[tuple[Layout, str], tuple[float, float]] = {}
    for layout, kind, time in steps:
        measured_s, predicted_s = sums.get((layout, kind), (0.0, 0.0))
        sums[layout, kind] = (
            measured_s + time.measured_s,
            predicted_s + time.predicted_s,
        )
    factors: dict[Layout, dict[str, float]] = {}
    for (layout, kind), (measured_s, predicted_s) in sorted(sums.items()):
        factors.setdefault(layout, {})[kind] = measured_s / predicted_s
    changed = {
        layout: dataclasses.replace(times, in_service=factors.get(layout, {}))
        for layout, times in profile.layouts.items()
    }
    return dataclasses.replace(profile, layouts=changed)


def serve_each(
    servers: Sequence[Server], source: RequestSource, profile: CalibratedProfile
) -> Iterator[Served]:
    """The steps of a run of each system, on a machine as slow as it was meanwhile.

    The pools hold garbage afterwards: probes write there, between the requests' steps.

    Args:
      servers: with live durations on the virtual clock.
      profile: of programs alone.
    """
    probes = choose_probes(server.engine for server in servers)
    for server in servers:
        cost, requests = cost_of(profile, server.engine), source(1.0, 0)
        rate_rps = _LOAD * _capacity_rps(server, cost, requests)
        speedometer = Speedometer(probes, lambda e, work: run_alone(e, work)[0])
        run = server.run(source(rate_rps, 0), {}, speedometer.around)
        occupancy = read_occupancy(server.deployment, run.log.lines)
        at = layouts(server.deployment)
        for time in step_times(occupancy, cost, speedometer.slowdown(profile)):
            program = cost.instances[time.instance].program(time.load)
            yield Served(at[time.instance], program.kind, time)


def _capacity_rps(
    server: Server, cost: CalibratedCost, requests: Sequence[Request]
) -> float:
    simulated = SimulatedDeployment(
        deployment=server.deployment,
        policies=server.policies,
        memory=tuple(server.memory),
        cost=cost,
    )
    slo = SLO(ttft_s=math.inf, tpot_s=math.inf)
    return capacity_rps(simulated, requests, slo)
