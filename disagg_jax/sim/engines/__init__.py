"""Serving engines as profiles: what is theirs and not the device's."""

from disagg_jax.sim.engines.profile import (
    EngineProfile,
    FitError,
    engine_names,
    engine_of,
    get_engine,
)

__all__ = ["EngineProfile", "FitError", "engine_names", "engine_of", "get_engine"]
