"""Computes closed forms of simple systems, to compare simulations with.

The queue is M/D/1: requests arrive at random (Poisson), are served in order and one at
a time, and each takes the same time. Source: DistServe (OSDI'24) section 3.1, where D
is `service_s`.
"""

from __future__ import annotations

import dataclasses

from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import require_one_stage
from disagg_jax.work import StepLoad


def md1_wait_s(rate_rps: float, service_s: float) -> float:
    """Return the mean wait before service: R D^2 / (2 (1 - R D)).

    Raises:
      ValueError: unless the server keeps up.
    """
    load = rate_rps * service_s
    require(0 <= load < 1, "rate_rps * service_s: expected in [0, 1)", load)
    return load * service_s / (2 * (1 - load))


def ttft_s(rate_rps: float, service_s: float) -> float:
    """Return the mean TTFT of one device."""
    return service_s + md1_wait_s(rate_rps, service_s)


def inter_op_ttft_s(rate_rps: float, service_s: float, stages: int = 2) -> float:
    """Return the mean TTFT of equal pipeline stages: all wait is before the first."""
    return service_s + md1_wait_s(rate_rps, service_s / stages)


def intra_op_ttft_s(rate_rps: float, service_s: float, speedup: float) -> float:
    """Return the mean TTFT if tensor parallelism divides the time by `speedup` (K)."""
    return ttft_s(rate_rps, service_s / speedup)


def bubble_share(batches: int, stages: int) -> float:
    """Return the idle share of stages that fill, pass `batches`, and drain."""
    return (stages - 1) / (batches + stages - 1)


@dataclasses.dataclass(frozen=True)
class ConstantInstance:
    """An `InstanceCost` whose steps all take the same time."""

    seconds: tuple[float, ...]  # on each pipeline stage

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        return self.seconds

    def decode_s(self, decodes: int, context: int) -> float:
        require_one_stage(len(self.seconds))
        return self.seconds[0]
