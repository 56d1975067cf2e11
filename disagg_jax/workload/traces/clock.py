"""The clock of a trace: the tick that it counts in, and rows of equal times.

A file whose clock ticks every 3 s has many rows at one time. They did not come at one
time: stretched to another rate they would be a burst however low the rate. So rows of
one tick are spread evenly over it in their order, unless they are to be kept.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ties = Literal["spread", "keep"]

# Clocks count in whole 10^-5 s or coarser; what is finer makes no burst that matters.
_PER_S = tuple(10**digits for digits in range(6))
_NOISE_S = 5e-7  # of times that are floats: an epoch's last bit is 2.4e-7 s
# A tick is coarse from this share of the mean gap on: ties in 1 % of rows, if they
# come independently. Two rows at one time of a finer clock are an accident, or a burst.
_COARSE = 0.01
_SHOW = 2  # rows in the tick of the row above that show a tick; one is an accident
_IRREGULAR = 0.01  # of a step, by which the times of a clock that is no decimal may err
_ENOUGH = 10  # times by which such a clock is known


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """How a trace's clock counts."""

    tick_s: float | None  # None: too fine to matter, or nothing shows that it ticks
    tied_rows: int  # in the tick of the row above; without a tick, at its very time


def find_clock(times_s: NDArray[np.float64]) -> Clock:
    """Finds the tick of times in ascending order.

    It is the largest of which all times, from the first on, are multiples. Only times
    that are equal show that a clock ticks: without several there is none.
    """
    times_s = times_s - times_s[:1]
    distinct = times_s[np.diff(times_s, prepend=-1.0) > _NOISE_S]
    tied = len(times_s) - len(distinct)
    if tied < _SHOW or len(distinct) < 2:
        return Clock(tick_s=None, tied_rows=tied)
    coarse_s = _COARSE * float(times_s[-1]) / (len(times_s) - 1)
    tick_s = _decimal_tick_s(distinct)
    if tick_s is None or tick_s < coarse_s:
        tick_s = _regular_tick_s(distinct)
    if tick_s is None or tick_s < coarse_s:
        return Clock(tick_s=None, tied_rows=tied)
    return Clock(tick_s=tick_s, tied_rows=tied)


def _decimal_tick_s(times_s: NDArray[np.float64]) -> float | None:
    """The common divisor of times with a few decimals."""
    for per_s in _PER_S:
        counts = np.rint(times_s * per_s)
        if np.all(np.abs(times_s * per_s - counts) <= _NOISE_S * per_s):
            return int(np.gcd.reduce(counts.astype(np.int64))) / per_s
    return None


def _regular_tick_s(times_s: NDArray[np.float64]) -> float | None:
    """A step, such as 1/3 s, of which all times are multiples to within 1 % of it."""
    if len(times_s) < _ENOUGH:
        return None
    least_s = float(np.diff(times_s).min())
    for parts in (1, 2, 3, 4):
        step_s = _refined(least_s / parts, times_s[1:].tolist())
        if step_s is not None:
            return step_s
    return None


def _refined(step_s: float, times_s: list[float]) -> float | None:
    """The step by ever later times, which tell it ever better; None if they do not."""
    for time_s in times_s:
        count = round(time_s / step_s)
        if count < 1 or abs(time_s - count * step_s) > _IRREGULAR * step_s:
            return None
        step_s = time_s / count
    return step_s


def spread_ties(times_s: NDArray[np.float64], tick_s: float) -> NDArray[np.float64]:
    """Times, in ascending order, with those of each tick evenly over it."""
    ticks = np.rint((times_s - times_s[0]) / tick_s)
    _, first, sizes = np.unique(ticks, return_index=True, return_counts=True)
    place = np.arange(len(times_s)) - np.repeat(first, sizes)
    return times_s + tick_s * place / np.repeat(sizes, sizes)
