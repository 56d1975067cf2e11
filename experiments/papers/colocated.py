"""Builds colocated systems on a roofline, for the figures of papers but DistServe's."""

from __future__ import annotations

from disagg_jax.deployment import Deployment, Role
from disagg_jax.scheduling.interface import Policy
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad
from experiments.configs.named_simulations import device_cost, named_simulation

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
    simulation = named_simulation(
        model,
        f"roofline/{hardware}",
        policies={Role.COLOCATED: policy},
        max_context=max_context,
        kv_memory=kv_memory,
    )
    return simulation.build(Deployment.parse(deployment))


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
    instance = device_cost(f"roofline/{hardware}", model).model.instance(1)
    (seconds,) = instance.stages_s(StepLoad(chunks, decodes, decodes * context))
    return seconds
