"""Cost models: how long a step or a transfer takes, predicted without running it.

One seam (`interface`) with several models: linear coefficients, a roofline of a named
model on named hardware, DistServe's fits, and times measured on an engine.
"""

from disagg_jax.sim.cost.deployment import CostExecutor, ModelledCost
from disagg_jax.sim.cost.distserve import FittedCost, FittedProfile
from disagg_jax.sim.cost.interface import CostModel, DeploymentCost, InstanceCost
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.cost.roofline import RooflineCost

__all__ = [
    "CostExecutor",
    "CostModel",
    "DeploymentCost",
    "FittedCost",
    "FittedProfile",
    "InstanceCost",
    "LinearCost",
    "ModelledCost",
    "RooflineCost",
]
