"""What a duration depends on, and who predicts it: the seam of the cost models.

A cost model knows neither requests nor blocks, only how much a step computes. It gives
an `InstanceCost` for each (tp, pp), so that whatever depends on these alone is worked
out once.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from disagg_jax.expect import expect


@dataclasses.dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes, as far as its duration depends on it.

    Raises:
      ValueError: on a step that computes nothing, or counts that no step can have.
    """

    # (start, count) of each prompt part: tokens cached before, tokens computed
    chunks: tuple[tuple[int, int], ...]
    decodes: int  # requests that decode one token each
    context: int  # tokens that those attend to together, each one's new one included

    def __post_init__(self) -> None:
        for start, count in self.chunks:
            if start < 0 or count < 1:
                raise ValueError(
                    f"chunks: expected (start >= 0, count >= 1), got {(start, count)}"
                )
        if not 0 <= self.decodes <= self.context or (self.context and not self.decodes):
            raise ValueError(
                "decodes, context: expected both 0, or 1 <= decodes <= context, "
                f"got {self.decodes}, {self.context}"
            )
        if not (self.chunks or self.decodes):
            raise ValueError("load: expected a chunk or a decode, got neither")

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens computed."""
        return sum(count for _, count in self.chunks)

    @property
    def prompt_squares(self) -> int:
        """The sum over chunks of (start + count)^2 - start^2.

        Whole prompts have their length squared. Prompt attention grows with it, and the
        chunks of a prompt add up to the prompt's.
        """
        return sum((start + n) ** 2 - start**2 for start, n in self.chunks)


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


def expect_parallelism(tp: int, pp: int) -> None:
    """Raises a ValueError unless both are at least 1."""
    expect(tp >= 1, "tp: expected >= 1", tp)
    expect(pp >= 1, "pp: expected >= 1", pp)


def expect_one_stage(pp: int) -> None:
    """Raises a ValueError unless `decode_s` has a meaning."""
    expect(pp == 1, "decode_s: expected pp = 1 (else use stages_s)", pp)
