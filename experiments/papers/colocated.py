"""Builds colocated systems on a roofline, for the figures of papers but DistServe's."""

from __future__ import annotations

import dataclasses

from disagg_jax.deployment import Parallelism, Role
from disagg_jax.scheduling.interface import Policy
from disagg_jax.sim import SimulatedDeployment, Simulation
from disagg_jax.work import StepLoad

ROOFLINE = "Ours is a roofline of data-sheet peaks, not fitted to the paper's engine"


def colocated(
    simulation: Simulation,
    policy: Policy,
    deployment: str,
    *,
    max_context: int,
    kv_memory: bool = True,
) -> SimulatedDeployment:
    """Build a `deployment` of a simulation's model and devices with `policy`."""
    asked = dataclasses.replace(
        simulation,
        policies={Role.COLOCATED: policy},
        max_context=max_context,
        kv_memory=kv_memory,
    )
    return asked.build(deployment)


def step_s(
    simulation: Simulation,
    *,
    chunks: tuple[tuple[int, int], ...] = (),
    decodes: int = 0,
    context: int = 0,
) -> float:
    """Return the seconds of a step on one device.

    Args:
      chunks: (tokens cached before, tokens) of each prompt part.
      context: tokens that each decode attends to.
    """
    instance = simulation.cost.instance(Parallelism())
    (seconds,) = instance.stages_s(StepLoad(chunks, decodes, decodes * context))
    return seconds
