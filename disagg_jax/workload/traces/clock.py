"""The clock of a trace: its tick, and rows of equal times.

A file whose clock ticks every 3 s has many rows at one time. Their requests did not
arrive together, but stretched to another rate they would be a burst, however low the
rate. So rows of one tick are spread evenly over it, in order, unless they are kept.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ties = Literal["spread", "keep"]

# Clocks count in whole 10^-5 s or coarser; finer ticks make no burst that matters.
_PER_S = tuple(10**digits for digits in range(6))
_NOISE_S = 5e-7  # error of float times: the last bit since 1970 is 2.4e-7 s
# A tick is coarse from this share of the mean gap on: 1 % of independent rows are tied.
# Two rows at one time of a finer clock are an accident, or a burst.
_COARSE = 0.01
_SHOW = 2  # rows in the tick of the row above that show a tick; one is an accident
_IRREGULAR = 0.01  # share of a step by which times of a non-decimal clock may err
_ENOUGH = 10  # distinct times that show a non-decimal clock


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """The tick of a trace's clock, and how many rows it ties."""

    tick_s: float | None  # None: too fine to matter, or no ties show one
    tied_rows: int  # in the tick of the row above; without a tick, at its very time


NO_CLOCK = Clock(tick_s=None, tied_rows=0)  # of lengths without times


def find_clock(times_s: NDArray[np.float64]) -> Clock:
    """Find the tick of times in ascending order.

    The tick is the largest number of seconds of which all times, counted from the
    first, are multiples. Only equal times show a tick: without several there is none.
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
    """Return the common divisor of times with a few decimals."""
    for per_s in _PER_S:
        counts = np.rint(times_s * per_s)
        if np.all(np.abs(times_s * per_s - counts) <= _NOISE_S * per_s):
            return int(np.gcd.reduce(counts.astype(np.int64))) / per_s
    return None


def _regular_tick_s(times_s: NDArray[np.float64]) -> float | None:
    """Return a step, such as 1/3 s, of which all times are multiples within 1 %."""
    if len(times_s) < _ENOUGH:
        return None
    least_s = float(np.diff(times_s).min())
    for parts in (1, 2, 3, 4):
        step_s = _refined(least_s / parts, times_s[1:].tolist())
        if step_s is not None:
            return step_s
    return None


def _refined(step_s: float, times_s: list[float]) -> float | None:
    """Refine the step by ever later times; None if one is no multiple of it."""
    for time_s in times_s:
        count = round(time_s / step_s)
        if count < 1 or abs(time_s - count * step_s) > _IRREGULAR * step_s:
            return None
        step_s = time_s / count
    return step_s


def spread_ties(times_s: NDArray[np.float64], tick_s: float) -> NDArray[np.float64]:
    """Return ascending times with the times of each tick spread evenly over it."""
    ticks = np.rint((times_s - times_s[0]) / tick_s)
    _, first, sizes = np.unique(ticks, return_index=True, return_counts=True)
    place = np.arange(len(times_s)) - np.repeat(first, sizes)
    return times_s + tick_s * place / np.repeat(sizes, sizes)
