"""The goodput of every layout of the two systems that an answer is about.

`comparison` searches for the best layout of a system: others are dropped as soon as
they are beaten, with a bound in the place of a goodput. A question with one cell has
room for a table of all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.progress import Progress, silent
from disagg_jax.search.candidates import CandidateResult, candidate_row
from disagg_jax.search.cells import counted, say_rate
from disagg_jax.search.comparison import (
    Option,
    SystemResult,
    SystemSearch,
    judge,
)
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
) -> tuple[SystemResult, ...]:
    """Search the layouts that were dropped of the two systems that are compared."""
    pair = {one.system for one in judge(results).pair}
    asked = {
        search.system: _dropped(one, search)
        for one, search in zip(results, searches, strict=True)
        if search.system in pair
    }
    tasks = [_in_full(*each) for each in itertools.chain(*asked.values())]
    goodputs = mapper(_goodput, tasks)
    part = "goodputs of other layouts"
    found = counted(goodputs, part, len(tasks), progress, say_rate)
    rows = {
        system: [_row(*each, next(found)) for each in dropped]
        for system, dropped in asked.items()
    }
    return tuple(_replaced(one, rows.get(one.system, ())) for one in results)


def _dropped(one: SystemResult, search: SystemSearch) -> list[tuple[Option, Row]]:
    """Return the options that no goodput is known of, though they meet the targets."""
    return [
        (search.option(row["candidate"]), row)
        for row in one.candidates
        if row["goodput"] is None and row["why"] in ("beaten", "bound")
    ]


def _in_full(option: Option, row: Row) -> GoodputSearch:
    """Return the search of a layout, by any bracket: rates a growth apart."""
    search, devices = option.candidate.search, option.candidate.devices
    start_rps = min(search.first_rps(), row["at_most"] * devices / search.plan.growth)
    plan = dataclasses.replace(search.plan, tolerance=search.plan.growth - 1)
    return dataclasses.replace(search, start_rps=start_rps, plan=plan)


def _goodput(search: GoodputSearch) -> SimGoodput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DependentSeedsWarning)  # the report says so
        return find_goodput(search)


def _row(option: Option, row: Row, goodput: SimGoodput) -> dict[str, Any]:
    found = CandidateResult(candidate=option.candidate, goodput=goodput)
    return {**candidate_row(found), "parameters": row["parameters"]}


def _replaced(one: SystemResult, rows: Sequence[Row]) -> SystemResult:
    """Return the system with these rows in their places, the best first but for it."""
    new = {row["candidate"]: row for row in rows}
    best, *others = (new.get(row["candidate"], row) for row in one.candidates)
    others.sort(key=lambda row: -(row["goodput"] or 0.0))
    return dataclasses.replace(one, candidates=(best, *map(dict, others)))
