"""Settings that make a host's processor look like separate devices."""

from __future__ import annotations

import os

from disagg_jax.engine.devices import provide_host_devices as provide

__all__ = ["one_thread_each", "pin", "provide"]
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def one_thread_each() -> None:
    """Give every host device one thread, so that two devices do not share both cores.

    Call it before JAX looks for devices. It changes nothing on an accelerator.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD}".strip()


def pin(cores: int) -> None:
    """Keep this process, and the threads that JAX will start, on `cores` cores.

    Call it before JAX looks for devices: JAX starts one thread for each core.

    Raises:
      ValueError: if the process has fewer cores.
    """
    have = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(have):
        raise ValueError(f"cores: expected 1 to {len(have)}, got {cores}")
    os.sched_setaffinity(0, have[-cores:])
