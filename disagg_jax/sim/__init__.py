"""Simulation: deployments that exist only as durations, served on the virtual clock.

`Simulation.of` names a model, devices and a system, and builds any deployment of them.
`SimulatedDeployment` runs the same controller as an engine does. Its durations come
from a cost model (`sim.cost`) for devices, links and memory as data sheets describe
them (`sim.hardware`).
"""

from disagg_jax import own_packages as own_packages  # first: it checks the path
from disagg_jax.sim.device_cost import DeviceCost
from disagg_jax.sim.policy_check import check_system
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.simulation import Simulation
from disagg_jax.sim.workers import Mapper, process_pool, worker_pool

__all__ = [
    "DeviceCost",
    "Mapper",
    "SimulatedDeployment",
    "Simulation",
    "check_system",
    "process_pool",
    "worker_pool",
]
