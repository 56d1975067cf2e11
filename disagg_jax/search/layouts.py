"""The goodput of every layout of every system of a cell.

`comparison` searches for the best layout of a system: others are dropped as soon as
they are beaten, with a bound in the place of a goodput. A question with one cell has
room for a table of all of them, each searched with the seeds and the plan of the best.
"""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.search.candidates import (
    BEATEN,
    BOUND,
    CandidateResult,
    candidate_row,
)
from disagg_jax.search.cells import counted, say_rate
from disagg_jax.search.comparison import Option, SystemResult, SystemSearch
from disagg_jax.search.goodput import (
    DependentSeedsWarning,
    GoodputSearch,
    SimGoodput,
    find_goodput,
)
from disagg_jax.sim.workers import Mapper

Row = Mapping[str, Any]  # of `candidate_row`


def with_all_layouts(
    results: Sequence[SystemResult],
    searches: Sequence[SystemSearch],
    mapper: Mapper,
    progress: Progress = silent,
    stop: Stop = never,
) -> tuple[SystemResult, ...]:
    """Search the layouts that were dropped, of every system.

    Args:
      stop: whether the time is spent. The layouts that are left keep their bounds then.
    """
    asked = [
        (search.option(row["candidate"]), row)
        for one, search in zip(results, searches, strict=True)
        for row in dropped(one)
    ]
    tasks = [_in_full(*each) for each in asked]
    part = "goodputs of other layouts"
    found = counted(mapper(_goodput, tasks), part, len(tasks), progress, say_rate)
    rows = collections.deque[dict[str, Any]]()
    for each, goodput in zip(asked, found, strict=True):
        rows.append(_row(*each, goodput))
        if stop():
            break
    return tuple(_replaced(one, rows) for one in results)


def dropped(one: SystemResult) -> Iterator[Row]:
    """Yield the rows without a goodput, though their layouts may well have one."""
    for row in one.candidates:
        if row["goodput"] is None and row["why"] in (BEATEN, BOUND):
            yield row


def _in_full(option: Option, row: Row) -> GoodputSearch:
    """Return the search of a layout, from no higher than its bound."""
    search, devices = option.candidate.search, option.candidate.devices
    start_rps = min(search.first_rps(), row["at_most"] * devices / search.plan.growth)
    return dataclasses.replace(search, start_rps=start_rps)


def _goodput(search: GoodputSearch) -> SimGoodput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DependentSeedsWarning)  # the report says so
        return find_goodput(search)


def _row(option: Option, row: Row, goodput: SimGoodput) -> dict[str, Any]:
    found = CandidateResult(candidate=option.candidate, goodput=goodput)
    return {**candidate_row(found), "parameters": row["parameters"]}


def _replaced(
    one: SystemResult, rows: collections.deque[dict[str, Any]]
) -> SystemResult:
    """Take the system's rows off the front; order all by goodput, but for the best."""
    new = {row["candidate"]: rows.popleft() for row in dropped(one) if rows}
    best, *others = (new.get(row["candidate"], row) for row in one.candidates)
    others.sort(key=lambda row: -(row["goodput"] or 0.0))
    return dataclasses.replace(one, candidates=(best, *map(dict, others)))
