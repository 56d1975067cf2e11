"""Where simulations run: in processes on this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

from disagg_jax.sim.workers import Mapper, worker_pool

# Processes on this machine; or "ray", or the address of a cluster: see `ray_pool`.
Workers = int | str


@contextlib.contextmanager
def open_workers(workers: Workers | None = None) -> Generator[Mapper]:
    """Yield a mapper over workers, which live as long as the context.

    Args:
      workers: None is a process for each core. With 1 nothing is started.

    Raises:
      ValueError: if `workers` < 1, or no cluster is at that address.
    """
    if isinstance(workers, str):
        from experiments.cli.ray_workers import ray_pool  # needs the extra [cluster]

        with ray_pool(workers) as mapper:
            yield mapper
        return
    with worker_pool(workers) as mapper:
        yield mapper


def parse_workers(text: str) -> Workers:
    """Return the workers that a flag names.

    Raises:
      ValueError: if it is neither a number nor a cluster.
    """
    if text == "ray":
        return os.environ.get("RAY_ADDRESS", text)
    if ":" in text:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"workers: expected processes >= 1, ray, or an address HOST:PORT, got "
            f"'{text}'"
        )
    return int(text)
