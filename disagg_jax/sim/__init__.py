"""Simulation: deployments that exist only as durations, served on the virtual clock.

`SimulatedDeployment` runs the same controller as an engine does. Its durations come
from a cost model (`sim.cost`) for devices, links and memory as data sheets describe
them (`sim.hardware`).
"""
