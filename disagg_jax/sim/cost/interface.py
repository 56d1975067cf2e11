"""The seam of the cost models: protocols that predict how long work takes.

A `CostModel` knows neither requests nor blocks, only how much a step computes. It makes
an `InstanceCost` for each `Parallelism`, which works out once whatever depends on it
alone. A `DeploymentCost` puts the instances of a deployment and its transfers together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer

Decoder: TypeAlias = Callable[[int, int], float]  # (decodes, context tokens) -> seconds


class InstanceCost(Protocol):
    """Durations on one instance, whose parallelism the cost model was given."""

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds of a step on each of the pp pipeline stages."""
        ...

    def decode_s(self, decodes: int, context: int) -> float:
        """Return `stages_s` of a decode-only step on the one stage, fast.

        The simulator calls this for every iteration of a span, with counts that it has
        checked before.

        Raises:
          ValueError: where pp is not 1.
        """
        ...


class CostModel(Protocol):
    """Durations of one model on one kind of device, by parallelism."""

    @property
    def name(self) -> str:
        """The name that outputs are marked with."""
        ...

    def instance(self, parallelism: Parallelism) -> InstanceCost:
        """Return the durations on an instance.

        Raises:
          ValueError: naming what is known, if there is no data for this parallelism.
        """
        ...


class DeploymentCost(Protocol):
    """Durations of the work of one deployment, in seconds."""

    def stages_s(self, instance: int, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds of a step on each pipeline stage of an instance."""
        ...

    def decoder(self, instance: int) -> Decoder:
        """Return a fast path for decode-only steps on a single-stage instance.

        It equals `stages_s`.
        """
        ...

    def hop(self, transfer: Transfer) -> Hop:
        """Return the wire that a transfer takes, and for how long."""
        ...


def require_one_stage(pp: int) -> None:
    """Raise a ValueError unless `decode_s` has a meaning."""
    require(pp == 1, "decode_s: expected pp = 1 (else use stages_s)", pp)
