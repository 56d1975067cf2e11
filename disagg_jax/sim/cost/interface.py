"""Who predicts how long a step takes: the seam of the cost models.

A cost model knows neither requests nor blocks, only how much a step computes. It gives
an `InstanceCost` for each (tp, pp), so that whatever depends on these alone is worked
out once.
"""

from __future__ import annotations

from typing import Protocol

from disagg_jax.errors import require
from disagg_jax.work import StepLoad


class InstanceCost(Protocol):
    """Durations on one instance; the cost model that made it was given tp and pp."""

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Seconds on each pipeline stage, pp entries."""
        ...

    def decode_s(self, decodes: int, context: int) -> float:
        """Where pp is 1: exactly `stages_s` of that decode-only step, but cheap.

        The simulator calls it once in each iteration of a span, with counts it has
        checked; this does not check them again.

        Raises:
          ValueError: where pp is not 1.
        """
        ...


class CostModel(Protocol):
    """Durations of one model on one kind of device, for several (tp, pp)."""

    @property
    def name(self) -> str:
        """What outputs are marked with."""
        ...

    def instance(self, tp: int, pp: int = 1) -> InstanceCost:
        """The durations on an instance of tp x pp devices.

        Raises:
          ValueError: naming what there is, if it has no data for it.
        """
        ...


def require_one_stage(pp: int) -> None:
    """Raises a ValueError unless `decode_s` has a meaning."""
    require(pp == 1, "decode_s: expected pp = 1 (else use stages_s)", pp)
