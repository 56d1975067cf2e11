"""Figures beside their bounds, and medians of measurements taken in turn."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from disagg_jax.errors import require
from disagg_jax.progress import Progress, Stop, never, silent
from experiments.report.table import align

# -- figures ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number beside its bound."""

    part: str  # which part of the report
    name: str
    measured: float
    bound: float
    unit: str  # of both
    bound_name: str  # what the bound is
    better: Literal["more", "less"] = "more"
    aim: float | None = None  # of the ratio; None where it is only for information

    @property
    def ratio(self) -> float:
        return self.measured / self.bound

    @property
    def met(self) -> bool | None:
        """Return whether the ratio reaches its aim; None without one."""
        if self.aim is None:
            return None
        more = self.better == "more"
        return self.ratio >= self.aim if more else self.ratio <= self.aim

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio, "met": self.met}


def table(figures: Sequence[Figure]) -> str:
    """Return a line for each figure: measured, bound, ratio, aim."""
    head = (
        *("part", "figure", "measured", "bound", "unit", "ratio", "aim", ""),
        "bound is",
    )
    rows = [head, *(_row(figure) for figure in figures)]
    return "\n".join(align(rows, right=(2, 3, 5)))


def _row(figure: Figure) -> tuple[str, ...]:
    sign = ">=" if figure.better == "more" else "<="
    return (
        figure.part,
        figure.name,
        _digits(figure.measured),
        _digits(figure.bound),
        figure.unit,
        f"{figure.ratio:.2f}",
        "" if figure.aim is None else f"{sign} {figure.aim:g}",
        {True: "ok", False: "MISSED", None: ""}[figure.met],
        figure.bound_name,
    )


def _digits(value: float) -> str:
    """Return four digits, so that a reader can check the ratio."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value) or 1)))}f}"


# -- timing ----------------------------------------------------------------------------


def timed_s(run: Callable[[], object]) -> float:
    """Return the seconds that `run` takes; it must wait for its own result."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def interleaved(
    repeats: int, measures: Mapping[str, Callable[[], float]]
) -> dict[str, float]:
    """Return the median of each measure over the rounds of `values_in_turn`."""
    return medians(values_in_turn(repeats, measures))


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in values.items()}


def values_in_turn(
    repeats: int,
    measures: Mapping[str, Callable[[], float]],
    progress: Progress = silent,
    stop: Stop = never,
) -> dict[str, list[float]]:
    """Return the values of each measure, without a first round that is the warm-up.

    The rounds go over all measures in turn, so that a slow moment of the machine falls
    on both sides of a ratio.

    Args:
      repeats: rounds after the warm-up, at most.
      stop: asked before each of them but the first.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    for i in range(repeats + 1):
        if i > 1 and stop():
            break
        progress("rounds", i, repeats + 1, "")
        for name, measure in measures.items():
            value = measure()
            if i:
                values[name].append(value)
    return values


def check_numbers(**numbers: Sequence[int]) -> None:
    """Raise ValueError unless each option has one number or more, all of them >= 1."""
    for name, values in numbers.items():
        enough = min(values, default=0) >= 1
        require(enough, f"{name}: expected numbers >= 1", list(values))


def load_average() -> str:
    """Return the load average of the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def keep_freed_memory() -> None:
    """Make malloc keep large blocks that are freed, as accelerators' allocators do.

    XLA's CPU buffers come from malloc, which by default returns a large block to the
    kernel and faults a new one in page by page: 128 MiB of KV moved at 0.4 GB/s, and
    at 1.6 with this. Call it before threads start. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
