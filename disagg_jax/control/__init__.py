"""What is decided: events in, work out. Pure: no clock, no I/O, no JAX.

`Controller` decides, and a `Backend` does the work and owns time: the simulator's
clock or an engine's. `serve` brings the two together. One controller serves both, so a
system that wins in simulation is the system that runs.
"""

from disagg_jax.control.backend import Backend, Executor, Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import Followers, Intervention, Observer, serve

__all__ = [
    "Backend",
    "Controller",
    "Executor",
    "Followers",
    "Intervention",
    "Observer",
    "Outcome",
    "serve",
]
