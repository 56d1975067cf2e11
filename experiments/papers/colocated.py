"""Builds colocated systems on a roofline, for the figures of papers but DistServe's."""

from __future__ import annotations

from disagg_jax.deployment import Parallelism, Role
from disagg_jax.scheduling.interface import Policy
from disagg_jax.sim import SimulatedDeployment, Simulation
from disagg_jax.work import StepLoad

ROOFLINE = "Ours is a roofline of data-sheet peaks, not fitted to the paper's engine"


def colocated(
    model: str,
    hardware: str,
    policy: Policy,
    deployment: str,
    *,
    max_context: int,
    kv_memory: bool = True,
) -> SimulatedDeployment:
    """Build a `deployment` that serves `model` on `hardware` with `policy`."""
    simulation = Simulation.of(
        model,
        hardware,
        policies={Role.COLOCATED: policy},
        max_context=max_context,
        kv_memory=kv_memory,
    )
    return simulation.build(deployment)


def step_s(
    model: str,
    hardware: str,
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
    instance = Simulation.of(model, hardware).cost.instance(Parallelism())
    (seconds,) = instance.stages_s(StepLoad(chunks, decodes, decodes * context))
    return seconds
