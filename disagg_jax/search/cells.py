"""Every system in every cell of the maps, with seeds enough to tell who wins.

Every system is searched with a few seeds. While the pair of `CellVerdict` is not told
apart, these two get more, in the fixed steps of `ComparisonSpec.looks`; intervals are
corrected for the looks. A seed that is added has a search of its own (`find_goodput`),
from the rate that the others gave.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.search.comparison import (
    ComparisonSpec,
    SystemResult,
    SystemSearch,
    judge,
    search_system,
    system_searches,
)
from disagg_jax.search.goodput import GoodputSearch, SimGoodput, find_goodput
from disagg_jax.search.maps import Map
from disagg_jax.sim.workers import Mapper

Result = TypeVar("Result")
Grid = dict[tuple[int, int], tuple[SystemResult, ...]]


def compare(
    spec: ComparisonSpec,
    maps: Sequence[Map],
    mapper: Mapper,
    progress: Progress = silent,
    stop: Stop = never,
) -> list[Grid]:
    """Search every system in every cell of every map, with seeds enough to tell.

    Args:
      stop: whether the time is spent. The cells that were not begun are left out then,
        but for the first.
    """
    grids: list[Grid] = [{} for _ in maps]
    cells = [
        (grid, each, at)
        for grid, each in zip(grids, maps, strict=True)
        for at in each.cells
    ]
    asked = [system_searches(spec, each.cells[at]) for _, each, at in cells]
    tasks = list(itertools.chain(*asked))
    part = f"goodputs ({len(cells)} cells x {len(spec.systems)} systems)"
    found = counted(mapper(search_system, tasks), part, len(tasks), progress)
    for grid, _, at in cells:
        if stop() and any(grids):
            break
        grid[at] = tuple(itertools.islice(found, len(spec.systems)))
    for searches, (grid, each, at) in zip(asked, cells, strict=True):
        if at in grid:
            part = f"more seeds, {each.where(at)}"
            grid[at] = tell_apart(grid[at], searches, mapper, progress, stop, part)
    return grids


def counted(
    results: Iterator[Result],
    part: str,
    total: int,
    progress: Progress,
    say: Callable[[Result], str] = str,
) -> Iterator[Result]:
    """Yield results, and tell `progress` how many came."""
    progress(part, 0, total, "")
    for done, result in enumerate(results, 1):
        progress(part, done, total, say(result))
        yield result


# ---- more seeds ----------------------------------------------------------------------


def tell_apart(
    results: Sequence[SystemResult],
    searches: Sequence[SystemSearch],
    mapper: Mapper,
    progress: Progress = silent,
    stop: Stop = never,
    part: str = "more seeds",
) -> tuple[SystemResult, ...]:
    """Give the two best more seeds, look by look, until they are told apart."""
    by_system = {search.system: search for search in searches}
    found = {one.system: one for one in results}
    for look in searches[0].looks[1:]:
        while lacking := _lacking(tuple(found.values()), look):
            if stop():
                return tuple(found.values())
            asked = [_more(one, by_system[one.system], look) for one in lacking]
            tasks = list(itertools.chain(*asked))
            more = counted(
                mapper(find_goodput, tasks), part, len(tasks), progress, say_rate
            )
            for one, each in zip(lacking, asked, strict=True):
                added = list(itertools.islice(more, len(each)))
                devices = by_system[one.system].option(one.deployment).candidate.devices
                found[one.system] = _extended(one, added, devices)
    return tuple(found.values())


def say_rate(goodput: SimGoodput) -> str:
    """Write a goodput of all devices."""
    return f"{goodput.rps:.3g} requests/s"


def _lacking(results: Sequence[SystemResult], look: int) -> list[SystemResult]:
    """Return those of the pair with fewer seeds; none if it is told apart by `look`.

    More seeds may make another system the best of its kind: it gets them too.
    """
    judged = judge(results)
    lacking = [one for one in judged.pair if len(one.per_seed_rps) < look]
    even = len({len(one.per_seed_rps) for one in judged.pair}) == 1
    return lacking if judged.wants_seeds or not even else []


def _more(one: SystemResult, search: SystemSearch, look: int) -> list[GoodputSearch]:
    """Return a search for each seed that is added."""
    known = search.option(one.deployment).candidate
    return [
        dataclasses.replace(
            known.search, seeds=(seed,), start_rps=one.rps * known.devices
        )
        for seed in range(len(one.per_seed_rps), look)
    ]


def _extended(
    one: SystemResult, added: Sequence[SimGoodput], devices: float
) -> SystemResult:
    rates = [goodput.rps / devices for goodput in added]
    return dataclasses.replace(one, per_seed_rps=(*one.per_seed_rps, *rates))
