"""Describes pictures as data: curves, bars and maps of cells.

Colours are indices into `colours.COLOURS`; `system_colours` has those of systems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from disagg_jax.metrics import Interval, Stages, rate_interval

Key = TypeVar("Key", bound=Hashable)
XY = tuple[float, float]
Style = Literal["line", "dots", "dashed", "dotted", "paper", "diamond", "cloud"]

STAGES = tuple(
    field.name.removesuffix("_s") for field in dataclasses.fields(Stages)
)  # of a request, in order
STAGE_COLOURS = dict(zip(STAGES, (7, 4, 6, 5, 2), strict=True))
STAGE_LEGEND = {name.replace("_", " "): c for name, c in STAGE_COLOURS.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A curve."""

    label: str  # "" is left out of the legend
    points: Sequence[XY]
    colour: int
    band: Sequence[tuple[float, float]] = ()  # low and high at each point
    style: Style = "line"  # "paper": published points, as hollow markers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves on one set of axes."""

    title: str
    x: str  # quantity (unit)
    y: str
    series: Sequence[Series]
    line: float | None = None  # a horizontal one, in the units of y
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] = ()  # instead of matplotlib's own
    ylim: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of `Bars`."""

    label: str
    spans: Sequence[tuple[float, float, int]]  # from, to, colour
    interval: XY | None = None  # low and high
    ticks: Sequence[float] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars, the first on top."""

    title: str
    x: str
    bars: Sequence[Bar]
    legend: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    ticks: str = ""  # what the bars' ticks are, for the legend


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColouredCell:
    """A rectangle of a `CellMap`."""

    text: str
    colour: int | None  # None is white
    hatched: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellMap:
    """Coloured cells over two quantities."""

    title: str
    x: str
    y: str
    columns: Sequence[str]  # values of x
    rows: Sequence[str]  # values of y, from the bottom
    cells: Mapping[tuple[int, int], ColouredCell]  # (column, row)
    legend: Mapping[str, int]
    hatched: str  # what hatching means, for the legend
    notes: Sequence[str] = ()  # more of the legend


# Seeds from which a curve has a band. The interval of two is 12.7 times as wide as they
# are apart, and hides all curves below it.
BAND_SEEDS = 3


def curves(
    points: Mapping[Key, Sequence[XY]],
    named: str = "{}",
    *,
    colours: Mapping[Key, int] | None = None,
    style: Style = "line",
) -> list[Series]:
    """Return a curve for each key, in colours that count up unless they are given."""
    return [
        Series(
            label=named.format(key),
            points=of_key,
            colour=i if colours is None else colours[key],
            style=style,
        )
        for i, (key, of_key) in enumerate(points.items())
    ]


def banded(
    label: str,
    values: Mapping[float, Sequence[float]],
    colour: int,
    style: Style = "line",
) -> Series:
    """Return a curve of means over seeds with their 95 % intervals.

    Args:
      values: x -> one value for each seed; of fewer than `BAND_SEEDS` no interval.
    """
    found = {
        x: rate_interval(of_seeds, independent=len(of_seeds) >= BAND_SEEDS)
        for x, of_seeds in values.items()
    }
    return Series(
        label=label,
        points=[(x, interval.mean) for x, interval in found.items()],
        band=[ends(interval) for interval in found.values()],
        colour=colour,
        style=style,
    )


def banded_curves(
    values: Mapping[Key, Mapping[Any, Sequence[float]]],
    named: str = "{}",
    *,
    colours: Mapping[Key, int] | None = None,
) -> list[Series]:
    """Return a banded curve for each key, in colours as those of `curves`."""
    return [
        banded(named.format(key), of_key, i if colours is None else colours[key])
        for i, (key, of_key) in enumerate(values.items())
    ]


def ends(interval: Interval) -> tuple[float, float]:
    """Return low and high; an end that is not known is the mean."""
    mean, low, high = interval.mean, interval.low, interval.high
    return mean if low is None else low, mean if high is None else high
