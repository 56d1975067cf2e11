"""Simulation: deployments that exist only as durations, served on the virtual clock.

`SimulatedDeployment` runs the same controller as an engine does. Its durations come
from a cost model (`sim.cost`) for devices, links and memory as data sheets describe
them (`sim.hardware`).
"""

from disagg_jax import own_packages as own_packages  # first: it checks the path
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import Mapper, process_pool, worker_pool

__all__ = ["Mapper", "SimulatedDeployment", "process_pool", "worker_pool"]
