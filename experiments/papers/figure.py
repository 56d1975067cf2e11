"""What a reproduced figure is: the runs it needs, its curves, and its claims."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from disagg_jax.metrics import Interval, rate_interval
from disagg_jax.sim.run import RunLatencies, SimulationTask, run_task
from disagg_jax.sim.workers import worker_pool
from experiments.papers.distserve.published import XY

Item = TypeVar("Item")
Result = TypeVar("Result")
_STEPS = 10  # lines of progress for a figure, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A curve. The same colour is the same system, ours or the paper's."""

    label: str
    points: Sequence[XY]
    colour: int
    band: Sequence[tuple[float, float]] = ()  # low and high at each point
    paper: bool = False  # published points: hollow markers
    dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes."""

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
class Claim:
    """A row of the report."""

    claim: str  # what the paper says; "beyond" where it says nothing
    paper: str
    ours: str  # from the runs
    why: str  # where they differ
    runs: str  # requests, seeds, system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came of a figure."""

    panels: Sequence[Panel]
    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lab:
    """How runs are done: the same for all figures."""

    num_requests: int | None = None  # instead of each figure's own
    seeds: int = 5
    workers: int | None = None  # processes; None is one for each core
    progress: Callable[[str], None] = lambda message: None
    # "Low" or "High" -> devices -> seconds, measured elsewhere; None: not run.
    search_times: Mapping[str, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 4:
            raise ValueError(f"num_requests: expected >= 4, got {self.num_requests}")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected >= 1, got {self.seeds}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected >= 1, got {self.workers}")

    def requests(self, default: int) -> int:
        """Requests of a run for which the figure says `default`."""
        return self.num_requests or default

    def run(self, points: Sequence[SimulationTask]) -> list[RunLatencies]:
        """Simulates points, the longest first, and shows how far it is."""
        order = sorted(range(len(points)), key=lambda i: -points[i].num_requests)
        results = self.map(run_task, [points[i] for i in order])
        found = dict(zip(order, results, strict=True))
        return [found[i] for i in range(len(points))]

    def map(
        self, task: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Result]:
        """Does a task for each item in worker processes, and shows how far it is."""
        every = max(1, math.ceil(len(items) / _STEPS))
        workers = min(self.workers or os.cpu_count() or 1, max(1, len(items)))
        found: list[Result] = []
        with worker_pool(workers) as mapper:
            for result in mapper(task, items):
                found.append(result)
                if len(found) % every == 0 or len(found) == len(items):
                    self.progress(f"{len(found)} of {len(items)} runs")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure or table that can be reproduced."""

    title: str
    make: Callable[[Lab], Drawn]
    # What of a lab decides its numbers, or how fast they are made.
    reads: Sequence[str] = ("num_requests", "seeds", "workers")


def shown(values: Sequence[float], form: str = ".2f", unit: str = "") -> str:
    """The mean over seeds with its 95 % interval."""
    return shown_interval(rate_interval(values), form, unit)


def shown_interval(interval: Interval, form: str = ".2f", unit: str = "") -> str:
    """An interval as text."""
    mean, low, high = interval.mean, interval.low, interval.high
    if low is None or high is None:
        return f"{mean:{form}}{unit}"
    return f"{mean:{form}}{unit} [{low:{form}}, {high:{form}}]"


def banded(
    label: str, values: Mapping[float, Sequence[float]], colour: int, **style: bool
) -> Series:
    """A curve of means over seeds with their 95 % intervals.

    Args:
      values: x -> one value for each seed.
    """
    found = {x: rate_interval(of_seeds) for x, of_seeds in values.items()}
    return Series(
        label=label,
        points=[(x, interval.mean) for x, interval in found.items()],
        band=[(_or_mean(i.low, i), _or_mean(i.high, i)) for i in found.values()],
        colour=colour,
        **style,
    )


def _or_mean(end: float | None, interval: Interval) -> float:
    return interval.mean if end is None else end
