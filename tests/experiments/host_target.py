"""The host as a target of `compile_check`: nothing need be installed for it."""

import jax

from disagg_jax.sim.hardware import HARDWARE
from experiments.compiled.targets import CompileTarget

HERE = CompileTarget(
    name="cpu:8",
    hardware=HARDWARE["cpu"],
    memory_bytes=2**26,
    clock_hz=1e9,
    devices=jax.devices(),
)
