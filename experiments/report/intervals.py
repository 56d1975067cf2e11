"""Writes numbers: a mean with its interval, a ratio, a share, a value that may lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disagg_jax.metrics import Interval, interval_across, rate_interval


def interval_text(interval: Interval, form: str = ".2f", unit: str = "") -> str:
    """Write `mean [low, high]`, or the mean alone where an end is not known."""
    mean, low, high = interval.mean, interval.low, interval.high
    if low is None or high is None:
        return f"{mean:{form}}{unit}"
    return f"{mean:{form}}{unit} [{low:{form}}, {high:{form}}]"


def across_seeds(values: Sequence[float], form: str = ".2f", unit: str = "") -> str:
    """Write the mean over seeds with its 95 % interval."""
    return interval_text(rate_interval(values), form, unit)


def ratio_text(
    above: Sequence[float], below: Sequence[float], undefined: str = ""
) -> str:
    """Write the ratio, paired by seed, or `undefined` if a seed would divide by 0."""
    if undefined and min(below) == 0:
        return undefined
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return across_seeds(ratios, ".2f", "x")


def percent(shares: Sequence[float]) -> str:
    """Write shares as a percentage whose interval stays within 0 and 100."""
    found = interval_across([100 * share for share in shares])
    if found.low is not None and found.high is not None:
        low, high = max(0.0, found.low), min(100.0, found.high)
        found = dataclasses.replace(found, low=low, high=high)
    return interval_text(found, ".1f", " %")


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """Write `value` in multiples of `unit`, or a dash where there is none."""
    return "-" if value is None else f"{value / unit:{form}}"


def yes_or_no(value: bool | None) -> str:
    """Write an answer, or a dash where there is none."""
    return {True: "yes", False: "no", None: "-"}[value]
