"""Intervals of means over independent runs, and of ratios paired by seed.

Uncertainty comes from independent runs (`interval_across`), never from a binomial
formula over requests: requests that share a queue succeed and fail together. On an
M/D/1 queue of 1000 requests whose true attainment is 0.9, 95 % intervals covered the
truth this often (4000 runs; tests/metrics/test_metrics.py repeats the middle column):

    utilisation                             .6    .75   .85
    Student-t over 5 runs                   95    94    92 %
    Wilson (binomial) over one run          53    34    21 %
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit  # pyright: ignore  # scipy ships no types

from disagg_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its confidence interval; None where the values cannot give one."""

    mean: float
    low: float | None
    high: float | None


def interval_across(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the Student-t interval of the mean of independent runs, a value per seed.

    Equal values give an interval of width 0, which is optimistic for attainments near 1
    from a few seeds.

    Raises:
      ValueError: on no values, or a `confidence` outside (0, 1).
    """
    if len(values) == 0:
        raise ValueError("interval: expected at least one value, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean=mean, low=None, high=None)
    require(0 < confidence < 1, "confidence: expected in (0, 1)", confidence)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    # scipy.special, as scipy.stats takes most of a second to import.
    t = float(stdtrit(len(values) - 1, (1 + confidence) / 2))  # pyright: ignore
    half = t * error
    return Interval(mean=mean, low=mean - half, high=mean + half)


def look_confidence(looks: int, confidence: float = 0.95) -> float:
    """Return the confidence of intervals that are looked at up to `looks` times.

    Who takes more runs until an interval pleases stops too early where the runs happen
    to agree: an interval of 95 % then covers less often. By Bonferroni, intervals that
    each miss with a probability of 0.05 / `looks` cover in 95 % of cases together,
    whatever decides when to stop (tests/metrics/test_looks.py).
    """
    require(looks >= 1, "looks: expected >= 1", looks)
    return 1 - (1 - confidence) / looks


def rate_interval(
    values: Sequence[float], *, independent: bool = True, confidence: float = 0.95
) -> Interval:
    """Return `interval_across` of values >= 0, such as rates, with its low end >= 0.

    Args:
      independent: False if runs share samples, such as rows of a trace. Then only the
        mean is known.
    """
    found = interval_across(values, confidence)
    if found.low is None or not independent:
        return Interval(mean=found.mean, low=None, high=None)
    return Interval(mean=found.mean, low=max(0.0, found.low), high=found.high)


def runs_to_tell(ratio: Interval, runs: int) -> float:
    """Estimate how many runs in all would exclude 1 from the interval of a ratio.

    Widths of intervals, on logarithms, fall as 1 / sqrt(runs).

    Args:
      ratio: by `margin`, of so many `runs`.

    Returns:
      inf if the ratio is 1, or has no interval.
    """
    off = abs(math.log(ratio.mean))
    if ratio.low is None or ratio.high is None or off == 0:
        return math.inf
    half = math.log(ratio.high / ratio.low) / 2
    return runs * (half / off) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin:
    """The goodput of one system over that of another, paired by seed."""

    ratio: Interval | None  # geometric mean; None where one of them has no goodput
    clear: bool  # the interval excludes 1, or only one of them has a goodput at all


def margin(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    independent: bool = True,
    confidence: float = 0.95,
) -> Margin:
    """Compare goodputs by their ratio at each seed.

    The interval is taken on logarithms, so exchanging the systems inverts it. A system
    without goodput gives no ratio; the other system is clearly better if it has a
    goodput at each seed.

    Args:
      independent: whether seeds are independent samples; if not, there is no interval.
    """
    if min(*ours, *theirs) > 0:
        logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
        of_logs = interval_across(logs, confidence)
        mean, low, high = of_logs.mean, of_logs.low, of_logs.high
        if low is None or high is None or not independent:
            ratio = Interval(mean=math.exp(mean), low=None, high=None)
            return Margin(ratio=ratio, clear=False)
        ratio = Interval(mean=math.exp(mean), low=math.exp(low), high=math.exp(high))
        return Margin(ratio=ratio, clear=low > 0 or high < 0)
    alone = min(ours) > 0 == max(theirs) or min(theirs) > 0 == max(ours)
    return Margin(ratio=None, clear=alone)


def unpaired_margin(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    independent: bool = True,
    confidence: float = 0.95,
) -> Margin:
    """Compare goodputs of runs that share no requests; see `margin`.

    The interval is Welch's, of the difference between the mean logarithms. Runs that
    share requests after all are closer to each other than it says.
    """
    if min(*ours, *theirs) <= 0:
        return margin([min(ours), max(ours)], [min(theirs), max(theirs)])
    logs = [[math.log(value) for value in values] for values in (ours, theirs)]
    mean = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    if not independent or min(map(len, logs)) == 1:
        ratio = Interval(mean=math.exp(mean), low=None, high=None)
        return Margin(ratio=ratio, clear=False)
    half = _welch_half_width(logs, confidence)
    low, high = mean - half, mean + half
    ratio = Interval(mean=math.exp(mean), low=math.exp(low), high=math.exp(high))
    return Margin(ratio=ratio, clear=low > 0 or high < 0)


def _welch_half_width(samples: Sequence[Sequence[float]], confidence: float) -> float:
    """Return half the width of the interval of the difference of two samples' means.

    B. L. Welch, The generalization of "Student's" problem, Biometrika 34, 1947.
    """
    parts = [statistics.variance(values) / len(values) for values in samples]
    if sum(parts) == 0:
        return 0.0
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, samples, strict=True)
    )
    t = float(stdtrit(freedom, (1 + confidence) / 2))  # pyright: ignore
    return t * math.sqrt(sum(parts))
