"""Real devices: instances of a model on their meshes, on either clock.

Here jax, models and sharding meet. An `LLM` generates text. Below it, an `Engine` runs
steps and transfers of a deployment; an `EngineExecutor` puts them on the virtual clock,
a `WallBackend` on the clock of this machine.
"""

from disagg_jax import own_packages as own_packages  # first: it checks the path
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import EngineExecutor, TimingExecutor, run_alone
from disagg_jax.engine.llm import LLM, Generation, Piece
from disagg_jax.engine.wall_clock import WallBackend

__all__ = [
    "LLM",
    "Engine",
    "EngineExecutor",
    "Generation",
    "Piece",
    "TimingExecutor",
    "WallBackend",
    "run_alone",
]
