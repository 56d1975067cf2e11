"""Measured step times as tables, read between the measured points.

* A prefill takes seconds by prompt tokens computed, piecewise linear, and optionally a
  term in the squared lengths (see `StepLoad.prompt_squares`) for attention.
* A decode takes seconds by (requests, mean context of a request), bilinear: in each
  cell a + b requests + c mean + d requests x mean. The last is the total context.
* A step with both takes prefill + decode - floor. The floor (streamed weights,
  launches) is what each would take for nothing; one pass has it once.

Outside the grid the last cell is continued as a straight line. Upwards it never falls,
since measurement noise would else make more work cheaper; no time is below the floor.
Extrapolated times are a guess: a profile should cover what a simulation visits, from
one request and few tokens on.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import expect_one_stage, expect_parallelism
from disagg_jax.work import StepLoad


def interpolate(axis: Sequence[float], values: Sequence[float], x: float) -> float:
    """The piecewise linear function through (axis, values), continued outside.

    With one point it is constant; above the last point it does not fall.
    """
    if len(axis) == 1:
        return values[0]
    i = min(max(bisect.bisect_right(axis, x) - 1, 0), len(axis) - 2)
    slope = (values[i + 1] - values[i]) / (axis[i + 1] - axis[i])
    if x > axis[-1]:
        return values[-1] + max(slope, 0.0) * (x - axis[-1])
    return values[i] + slope * (x - axis[i])


def _check_axis(name: str, axis: Sequence[float]) -> None:
    increasing = all(a < b for a, b in zip(axis, axis[1:], strict=False))
    ok = increasing and len(axis) > 0 and axis[0] > 0
    require(ok, f"{name}: expected increasing numbers > 0", axis)


def _check_seconds(name: str, seconds: Sequence[float], length: int) -> None:
    require(len(seconds) == length, f"{name}: expected {length} times", seconds)
    require(min(seconds) > 0, f"{name}: expected times > 0", seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillTable:
    """Seconds of a prefill step by prompt tokens.

    Raises:
      ValueError: if the axis does not increase or the times do not match it.
    """

    tokens: tuple[float, ...]  # prompt tokens computed, of all prompts together
    seconds: tuple[float, ...]  # as many; without the term below
    square_s: float = 0.0  # seconds per squared token, on top

    def __post_init__(self) -> None:
        _check_axis("prefill.tokens", self.tokens)
        _check_seconds("prefill.seconds", self.seconds, len(self.tokens))
        require(self.square_s >= 0, "prefill.square_s: expected >= 0", self.square_s)

    def time_s(self, load: StepLoad) -> float:
        """Seconds of the prompt parts."""
        linear_s = interpolate(self.tokens, self.seconds, load.prompt_tokens)
        return linear_s + self.square_s * load.prompt_squares


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTable:
    """Seconds of a decode step by (requests, their mean context).

    Raises:
      ValueError: if an axis does not increase or the times do not match them.
    """

    decodes: tuple[float, ...]  # requests
    context: tuple[float, ...]  # mean tokens attended to by one, the new one included
    seconds: tuple[tuple[float, ...], ...]  # [decodes][context]

    def __post_init__(self) -> None:
        _check_axis("decode.decodes", self.decodes)
        _check_axis("decode.context", self.context)
        rows = len(self.decodes)
        expected = f"decode.seconds: expected {rows} rows"
        require(len(self.seconds) == rows, expected, self.seconds)
        for row in self.seconds:
            _check_seconds("decode.seconds", row, len(self.context))

    def lines(self, decodes: int) -> Lines:
        """The times of `decodes` requests, as lines over their total context."""
        columns = zip(*self.seconds, strict=True)
        row = [interpolate(self.decodes, column, decodes) for column in columns]
        totals = [decodes * mean for mean in self.context]
        if len(totals) == 1:
            return Lines((), ((row[0], 0.0),))
        lines: list[tuple[float, float]] = []
        for i in range(len(totals) - 1):
            slope = (row[i + 1] - row[i]) / (totals[i + 1] - totals[i])
            lines.append((row[i] - slope * totals[i], slope))
        slope = max(lines[-1][1], 0.0)  # above the grid
        lines.append((row[-1] - slope * totals[-1], slope))
        return Lines(tuple(totals[1:]), tuple(lines))


@dataclasses.dataclass(frozen=True, slots=True)
class Lines:
    """A piecewise linear function of the total context."""

    bounds: tuple[float, ...]  # where one line ends and the next begins
    lines: tuple[tuple[float, float], ...]  # (seconds at 0, seconds per token)


@dataclasses.dataclass(frozen=True, slots=True)
class StageTables:
    """What was measured of one pipeline stage.

    Raises:
      ValueError: if the floor is negative or above a measured time.
    """

    prefill: PrefillTable
    decode: DecodeTable
    floor_s: float  # what a prefill and a decode both take, whatever they compute

    def __post_init__(self) -> None:
        least = min(min(self.prefill.seconds), *map(min, self.decode.seconds))
        expected = f"floor_s: expected >= 0 and <= {least}, the least time"
        require(0 <= self.floor_s <= least, expected, self.floor_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolatedCost:
    """A `CostModel` of tables, for the (tp, pp) that were measured."""

    name: str  # what outputs are marked with
    stages: Mapping[tuple[int, int], tuple[StageTables, ...]]  # by (tp, pp): pp of them
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for (tp, pp), stages in self.stages.items():
            expect_parallelism(tp, pp)
            expected = f"{self.name}: expected {pp} stages for (tp, pp) = {(tp, pp)}"
            require(len(stages) == pp, expected, len(stages))

    def instance(self, tp: int, pp: int = 1) -> InterpolatedInstance:
        """The durations on tp x pp devices."""
        known = sorted(self.stages)
        expected = f"{self.name}: expected (tp, pp) in {known}"
        require((tp, pp) in self.stages, expected, (tp, pp))
        return InterpolatedInstance(self.stages[tp, pp])


class InterpolatedInstance:
    """An `InstanceCost`; the lines of each number of decodes are kept."""

    __slots__ = ("_first", "_floor_s", "_lines", "_stages")

    def __init__(self, stages: tuple[StageTables, ...]):
        self._stages = stages
        self._lines: list[dict[int, Lines]] = [{} for _ in stages]
        self._first, self._floor_s = self._lines[0], stages[0].floor_s

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Seconds on each stage."""
        return tuple(self._stage_s(stage, load) for stage in range(len(self._stages)))

    def decode_s(self, decodes: int, context: int) -> float:
        """Seconds of a decode-only step on the one stage."""
        known = self._first.get(decodes)
        if known is None:
            expect_one_stage(len(self._stages))
            known = self._find_lines(0, decodes)
        base_s, slope_s = known.lines[bisect.bisect_right(known.bounds, context)]
        time_s = base_s + slope_s * context
        return time_s if time_s > self._floor_s else self._floor_s

    def _stage_s(self, stage: int, load: StepLoad) -> float:
        tables = self._stages[stage]
        if not load.chunks:
            return self._decode_s(stage, load)
        prefill_s = max(tables.prefill.time_s(load), tables.floor_s)
        if not load.decodes:
            return prefill_s
        return prefill_s + self._decode_s(stage, load) - tables.floor_s

    def _decode_s(self, stage: int, load: StepLoad) -> float:
        known = self._find_lines(stage, load.decodes)
        i = bisect.bisect_right(known.bounds, load.context)
        base_s, slope_s = known.lines[i]
        return max(base_s + slope_s * load.context, self._stages[stage].floor_s)

    def _find_lines(self, stage: int, decodes: int) -> Lines:
        known = self._lines[stage]
        if decodes not in known:
            known[decodes] = self._stages[stage].decode.lines(decodes)
        return known[decodes]
