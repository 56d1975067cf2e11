"""Devices for a deployment; a host without accelerators is split into some."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from disagg_jax.deployment import Deployment
from sharding.mesh import Device


def provide_host_devices(needed: int) -> None:
    """Split the host into at least `needed` devices; accelerators stay as they are.

    Raises:
      RuntimeError: by JAX, if it has looked for devices before.
    """
    name = "jax_num_cpu_devices"
    if jax.config.values[name] < needed:
        jax.config.update(name, needed)


def find_devices(deployment: Deployment) -> Sequence[Device]:
    """Return the devices of this machine, with the host split if need be.

    Raises:
      ValueError: if they are too few for `deployment`; says how to get more.
    """
    needed = deployment.devices
    try:
        provide_host_devices(needed)
    except RuntimeError:
        pass  # JAX has started: the devices may do
    devices = jax.devices()
    if len(devices) >= needed:
        return devices
    kind = devices[0].platform
    remedy = (
        f"jax.config.update('jax_num_cpu_devices', {needed}) before anything else uses "
        "JAX splits the host into as many"
        if kind == "cpu"
        else "name a smaller deployment, such as colocated:tp1, or set "
        "JAX_PLATFORMS=cpu to try this one on host devices"
    )
    raise ValueError(
        f"deployment: expected {needed} devices for '{deployment}', got {len(devices)} "
        f"of kind {kind}; {remedy}"
    )
