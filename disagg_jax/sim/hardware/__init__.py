"""Hardware in simulation: devices, their memory, and the links between them."""

from disagg_jax.sim.hardware.device import (
    AllReduce,
    AllToAll,
    EfficiencyCurve,
    Hardware,
)
from disagg_jax.sim.hardware.link import LINKS, LinkSpec, get_link
from disagg_jax.sim.hardware.memory import Partition
from disagg_jax.sim.hardware.network import Hop, Network
from disagg_jax.sim.hardware.presets import HARDWARE, get_hardware

__all__ = [
    "HARDWARE",
    "LINKS",
    "AllReduce",
    "AllToAll",
    "EfficiencyCurve",
    "Hardware",
    "Hop",
    "LinkSpec",
    "Network",
    "Partition",
    "get_hardware",
    "get_link",
]
