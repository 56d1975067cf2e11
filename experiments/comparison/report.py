"""Writes a comparison of systems: tables, a picture, a sentence for each map."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from disagg_jax.metrics.intervals import Margin, runs_to_tell
from disagg_jax.scheduling import DISAGGREGATED
from disagg_jax.search.comparison import (
    CellVerdict,
    ComparisonSpec,
    SystemResult,
    cell_notes,
    judge,
    needed,
)
from disagg_jax.search.maps import (
    COLOCATED,
    INFEASIBLE,
    UNCLEAR,
    Axis,
    Map,
    Region,
    regions,
)
from disagg_jax.workload.workload import TraceWorkload, Workload
from experiments.comparison import serving
from experiments.comparison.serving import RateAnswer
from experiments.placement.report import lines
from experiments.report.colours import system_colours
from experiments.report.draw import draw
from experiments.report.intervals import interval_text
from experiments.report.panel import XY, Bar, Bars, CellMap, ColouredCell, Panel, curves
from experiments.report.table import align
from experiments.runs.folder import plain

Grid = Mapping[tuple[int, int], Sequence[SystemResult]]
_MOST_SEEDS = 1000  # beyond which nobody would go
_BOUNDED = "\u2020"  # a dagger: marks goodputs of runs that are too short

# ---- text ----------------------------------------------------------------------------


def text(
    spec: ComparisonSpec,
    maps: Sequence[Map],
    grids: Sequence[Grid],
    served: RateAnswer | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """Write all tables, then the sentences.

    Args:
      served: of a single cell, the devices that its rate needs.
      left_out: what the time did not suffice for.
    """
    parts = [_header(spec)]
    for each, grid in zip(maps, grids, strict=True):
        parts += [_table(each, grid), _goodputs(each, grid)]
    for each, grid in zip(maps, grids, strict=True):
        parts.append(_details(spec, each, grid))
    if is_single(maps, grids):
        parts.append(serving.layouts(next(iter(grids[0].values()))))
    if served is not None:
        parts.append(serving.fewest(served))
    parts += sentences(maps, grids)
    if served is not None:
        parts.append(serving.sentence(served))
    return "\n\n".join([*parts, *filter(None, [serving.left_out(left_out)])])


def is_single(maps: Sequence[Map], grids: Sequence[Grid]) -> bool:
    """Return whether there is one cell: an answer instead of maps."""
    return len(maps) == 1 and len(maps[0].cells) == 1 == len(grids[0])


def sentences(maps: Sequence[Map], grids: Sequence[Grid]) -> list[str]:
    """Say who wins where, for each map; of a single cell, its answer."""
    return [
        (_of_map(each, grid) if len(grid) > 1 else answer(*grid.values()))
        + bounded(grid)
        for each, grid in zip(maps, grids, strict=True)
    ]


def _of_map(each: Map, grid: Grid) -> str:
    judged = {at: judge(found) for at, found in grid.items()}
    verdicts = {at: one.verdict for at, one in judged.items()}
    unclear = undecided(list(judged.values()))
    if _two_kinds(grid):
        return sentence(each, verdicts) + unclear
    systems = [one.system for one in next(iter(grid.values()))]
    return winners(each, verdicts, systems) + unclear


def _two_kinds(grid: Grid) -> bool:
    return judge(next(iter(grid.values()))).two_kinds


def bounded(grid: Grid) -> str:
    """Say in how many cells runs are shorter than they should be; '' for none."""
    short = [found[0] for found in grid.values() if found[0].bounded]
    if not short:
        return ""
    least = min(one.num_requests / one.needed_requests for one in short)
    share = f"as little as {least:.1%} as long" if least else "never as long"
    return (
        f"\nBounded: in {len(short)} of {len(grid)} cells runs have "
        f"{short[0].num_requests} requests, the most that --max_requests allows, and "
        f"are {share} as their targets ask for: goodputs there are too high, as what "
        "arrives before the queue is long is good at any rate."
    )


def _header(spec: ComparisonSpec) -> str:
    limits = ", ".join(
        f"{name} {policy.limits.decode_rows}"
        for name in spec.systems
        for policy in spec.systems[name].values()
        if policy.limits.decode_rows
    )
    checked = "".join(f"{line}\n" for line in spec.simulation.checked.splitlines())
    return (
        f"{_on(spec)}, KV over {spec.simulation.wires}; simulated\n{checked}"
        f"goodput: requests/s per device at which {spec.plan.target:.0%} of the "
        f"requests meet both targets\n{_seeds(spec)}; N requests a run; ratios are "
        "paired by seed\n"
        f"requests that decode at once, at most: {limits}; fewer if a step is smaller\n"
        "the best of several candidates is a little too good, as they are compared on "
        "the runs by which they were chosen"
    )


def _seeds(spec: ComparisonSpec) -> str:
    """Say how many seeds there are, and how sure intervals are."""
    first, *more = spec.looks
    if not more:
        return f"{first} seeds; 95 % intervals over seeds"
    steps = " or ".join(map(str, more))
    pair = "the best disaggregated and the best colocated system"
    return (
        f"{first} seeds, and {steps} of {pair if spec.two_kinds else 'the two best'} "
        "until these are told apart; 95 % intervals over seeds, corrected for "
        f"{len(spec.looks)} looks"
    )


def _on(spec: ComparisonSpec) -> str:
    """Name the model, the devices and the cost model."""
    cost = spec.simulation.cost.name
    return f"{spec.simulation.model.name} on {spec.devices} devices, {cost}"


def _table(each: Map, grid: Grid) -> str:
    """Write a row for each cell."""
    head = (
        *(f"{axis.name}, {axis.unit}" for axis in (each.x, each.y)),
        *("N", "seeds", "winner", "goodput", "over the runner-up"),
        *(("disaggregated / best colocated",) if _two_kinds(grid) else ()),
        "verdict",
    )
    rows = [(*_at(each, at), *_row(judge(found))) for at, found in grid.items()]
    title = f"map of {each.name}: {each.fixed}"
    return "\n".join([title, *notes(each, grid), *align([head, *rows])])


def notes(each: Map, grid: Grid) -> list[str]:
    """Say where a map's requests come from, and why intervals are missing."""
    said: dict[str, None] = {}
    for cell in each.cells.values():
        if isinstance(cell.workload, TraceWorkload):
            said |= dict.fromkeys(cell.workload.notes)
            if rate := cell.workload.rate_rps:
                said[f"the trace's own rate: {rate:.4g} requests/s"] = None
    for at, found in grid.items():
        said |= dict.fromkeys(_no_more_rows(each.cells[at].workload, judge(found)))
    why = {one.why_dependent: None for found in grid.values() for one in found}
    return [*said, *(f"no interval: {reason}" for reason in why if reason)]


def _no_more_rows(workload: Workload, judged: CellVerdict) -> list[str]:
    """Say that an undecided cell had all the seeds that its trace has rows for."""
    if not isinstance(workload, TraceWorkload) or judged.verdict != UNCLEAR:
        return []
    requests = judged.winner.num_requests
    seeds = len(workload.rows) // requests
    all_used = 1 < judged.seeds == seeds
    return [f"it has rows for {seeds} seeds of {requests} requests"] if all_used else []


def _row(judged: CellVerdict) -> tuple[str, ...]:
    winner, (_, theirs) = judged.winner, judged.pair
    if judged.verdict == INFEASIBLE:
        why = f"{INFEASIBLE}: {judged.why_infeasible}"
        dashes = ("-",) * (4 if judged.two_kinds else 3)
        return (needed(winner), f"{judged.seeds}", *dashes, why)
    over = f"{_shown(judged.over)} {theirs.system}"
    return (
        needed(winner),
        f"{judged.seeds}",
        winner.system,
        interval_text(winner.goodput, ".3g"),
        f"{_shown(judged.over_runner_up)} {judged.ranked[1].system}",
        *((over,) if judged.two_kinds else ()),
        judged.verdict,
    )


def _shown(margin: Margin) -> str:
    if margin.ratio is None:
        return "only one serves:" if margin.clear else "some seeds have none:"
    unclear = "" if margin.clear else " (unclear)"
    return f"{interval_text(margin.ratio)}{unclear}"


def _goodputs(each: Map, grid: Grid) -> str:
    """Write the mean goodput of every system in every cell."""
    systems = [found.system for found in next(iter(grid.values()))]
    head = (each.x.name, each.y.name, *systems)
    rows = [
        (*_at(each, at), *(f"{one.rps:.3g}" for one in found))
        for at, found in grid.items()
    ]
    return "\n".join(["goodput, requests/s per device", *align([head, *rows])])


def _at(each: Map, at: tuple[int, int]) -> tuple[str, str]:
    """Write the values of a cell's axes."""
    return f"{each.x.values[at[0]]:g}", f"{each.y.values[at[1]]:g}"


def _details(spec: ComparisonSpec, each: Map, grid: Grid) -> str:
    """Write each system's deployment and parameters, with reasons."""
    out = [f"parameters, map of {each.name}"]
    for at, found in grid.items():
        x, y = _at(each, at)
        out.append(f"{each.x.name} {x}, {each.y.name} {y} {each.y.unit}")
        width = max(len(one.system) for one in found)
        for one in found:
            got = "; ".join([f"{one.deployment}: {_figure(one)}", *one.parameters])
            out.append(f"  {one.system:<{width}}  {got}")
            if spec.budgets:
                out += [f"    {line}" for line in lines(one.candidates)]
    return "\n".join(out)


def _figure(found: SystemResult) -> str:
    """Write the goodput and its doubts."""
    if found.rps == 0:
        return f"no goodput, alone it needs {found.needs:.3g} x the targets"
    best = found.candidates[0]
    doubts = [f"not {m}" for m in ("steady", "bracketed", "resolved") if not best[m]]
    doubts += [found.inversion] if found.inversion else []
    return ", ".join([f"{found.rps:.3g}/s", *doubts])


def answer(found: Sequence[SystemResult]) -> str:
    """Say who wins one cell, by how much, and how sure that is."""
    judged = judge(found)
    if judged.verdict == INFEASIBLE:
        return f"Nobody: {judged.why_infeasible}."
    winner, (ours, theirs) = judged.winner, judged.pair
    goodput = interval_text(winner.goodput, ".3g")
    over = f"{ours.system} over {theirs.system}"
    said = judged.verdict if judged.verdict == UNCLEAR else f"{winner.system} wins"
    if judged.two_kinds:
        over = f"Disaggregated over {theirs.system}, the best colocated system"
        kinds = {DISAGGREGATED: "disaggregate", COLOCATED: "do not disaggregate"}
        said = kinds.get(judged.verdict, UNCLEAR)
    ratio = judged.over.ratio
    how_much = interval_text(ratio) if ratio else "not both meet the targets"
    more = f" {more_seeds([judged])}" if judged.verdict == UNCLEAR else ""
    why = f" No interval: {winner.why_dependent}." if winner.why_dependent else ""
    rises = [f"\n{f.system}: {f.inversion}." for f in found if f.inversion]
    return (
        f"{winner.system} ({winner.deployment}) serves the most: {goodput} requests/s "
        f"per device.\n{over}: {how_much}: {said}.{more.rstrip()}{why}"
        f"{''.join(rises)}"
    )


def more_seeds(cells: Sequence[CellVerdict]) -> str:
    """Say how many seeds would probably tell the pairs apart; '' if nobody knows."""
    needed = [
        (runs_to_tell(ratio, one.seeds), one.seeds)
        for one in cells
        if (ratio := one.over.ratio) is not None and ratio.low is not None
    ]
    if not needed:
        return ""
    few = sorted(max(math.ceil(n), k + 1) for n, k in needed if n <= _MOST_SEEDS)
    had = max(k for _, k in needed)
    if not few:
        return f"After {had} seeds, even {_MOST_SEEDS} would probably not tell."
    counts = f"{few[0]}" if few[0] == few[-1] else f"{few[0]} to {few[-1]}"
    others = len(needed) - len(few)
    but = f", but in {others} not even {_MOST_SEEDS}" if others else ""
    return f"After {had} seeds, about {counts} would probably tell{but}."


def undecided(judged: Sequence[CellVerdict]) -> str:
    """Say how many cells nobody knows, and between what the ratio is; '' for none."""
    open_ = [one for one in judged if one.verdict == UNCLEAR]
    if not open_:
        return ""
    ratios = [one.over.ratio for one in open_ if one.over.ratio]
    lows = [r.mean if r.low is None else r.low for r in ratios]
    highs = [r.mean if r.high is None else r.high for r in ratios]
    pair = "disaggregated over the best colocated system"
    if not open_[0].two_kinds:
        pair = "the best system over the second"
    between = (
        f": {pair} is {min(lows):.2f} to {max(highs):.2f} there"
        if ratios
        else ": not every seed has a goodput there"
    )
    said = f"\nUndecided: {len(open_)} of {len(judged)} cells{between}."
    return " ".join(filter(None, [said, more_seeds(open_)]))


def sentence(each: Map, verdicts: Mapping[tuple[int, int], str]) -> str:
    """Say when not to disaggregate, by the cells of a map."""
    cases = [_case(each, r) for r in regions(verdicts, COLOCATED)]
    tried = _tried(each, verdicts, (DISAGGREGATED, COLOCATED))
    if not cases:
        cell = "decided cell" if UNCLEAR in verdicts.values() else "cell"
        return f"No {cell} says not to disaggregate {tried}."
    return f"Do not disaggregate with {'; nor with '.join(cases)} {tried}."


def winners(
    each: Map, verdicts: Mapping[tuple[int, int], str], systems: Sequence[str]
) -> str:
    """Say which system wins in which cells of a map, where all are of one kind."""
    tried = _tried(each, verdicts, systems)
    wins = [
        f"{name} wins with {'; and with '.join(cases)}"
        for name in systems
        if (cases := [_case(each, r) for r in regions(verdicts, name)])
    ]
    if not wins:
        return f"No cell has a clear winner {tried}."
    return f"{'. '.join(wins)} {tried}."


def _tried(
    each: Map, verdicts: Mapping[tuple[int, int], str], wins: Sequence[str]
) -> str:
    """Count the verdicts of a map's cells."""
    found = list(verdicts.values())
    names = (*wins, UNCLEAR, INFEASIBLE)
    counts = ", ".join(f"{name} {found.count(name)}" for name in names)
    return f"(of {len(verdicts)} cells, {each.fixed}: {counts})"


def _case(each: Map, region: Region) -> str:
    sides = map(_side, (each.x, each.y), region)
    whole = f"any {each.x.name} and {each.y.name} that was tried"
    return " and ".join(side for side in sides if side) or whole


def _side(axis: Axis, part: range) -> str:
    """Describe a part of an axis; '' for the whole axis."""
    low, high = axis.values[part[0]], axis.values[part[-1]]
    first, last = part[0] == 0, part[-1] == len(axis.values) - 1
    if first and last:
        return ""
    if low == high and not (first or last):
        bounds = f"= {low:g}"
    elif first:
        bounds = f"<= {high:g}"
    elif last:
        bounds = f">= {low:g}"
    else:
        bounds = f"from {low:g} to {high:g}"
    return f"{axis.name} {bounds} {axis.unit}"


# ---- JSON ----------------------------------------------------------------------------


def record(
    spec: ComparisonSpec,
    maps: Sequence[Map],
    grids: Sequence[Grid],
    served: RateAnswer | None = None,
    left_out: Sequence[str] = (),
) -> Any:
    """Return the spec and the results, ready for JSON; for arguments see `text`."""
    return {
        "served": None if served is None else serving.record(served),
        "left_out": list(left_out),
        "checked": spec.simulation.checked,
        "question": {
            **{key: value for key, value in plain(spec).items() if key != "type"},
            "systems": list(spec.systems),
            "policies": plain(spec.systems),
        },
        "maps": [
            {
                "name": each.name,
                "fixed": each.fixed,
                "x": plain(each.x),
                "y": plain(each.y),
                "sentence": said,
                "notes": notes(each, grid),
                "cells": [_cell(each, at, judge(found)) for at, found in grid.items()],
            }
            for each, grid, said in zip(
                maps, grids, sentences(maps, grids), strict=True
            )
        ],
    }


def _cell(each: Map, at: tuple[int, int], judged: CellVerdict) -> dict[str, Any]:
    infeasible = judged.verdict == INFEASIBLE
    return {
        each.x.name: each.x.values[at[0]],
        each.y.name: each.y.values[at[1]],
        "cell": plain(each.cells[at]),
        "verdict": judged.verdict,
        "winner": judged.winner.system if judged.winner.rps else None,
        "why_infeasible": judged.why_infeasible if infeasible else None,
        "over_runner_up": plain(judged.over_runner_up),
        "best_colocated": judged.pair[1].system if judged.two_kinds else None,
        "over_colocated": plain(judged.over) if judged.two_kinds else None,
        "num_requests": judged.winner.num_requests,
        "seeds": judged.seeds,
        "bounded": judged.winner.bounded,
        "notes": cell_notes(judged.ranked),
        "systems": [
            {**plain(one), "goodput": plain(one.goodput)} for one in judged.ranked
        ],
    }


# ---- picture -------------------------------------------------------------------------


def plot(
    spec: ComparisonSpec,
    maps: Sequence[Map],
    grids: Sequence[Grid],
    path: pathlib.Path,
) -> None:
    """Draw a map of winners for each pair of axes; of a single cell, all goodputs."""
    pairs = list(zip(maps, grids, strict=True))
    if is_single(maps, grids):
        ((each, grid),) = pairs
        panels = [_bars(each, *grid.values())]
        title = f"{_on(spec)}, {_runs(grids)}; {each.fixed}"
    else:
        panels = [_cell_map(spec, each, grid) for each, grid in pairs]
        title = f"Who serves the most: {_on(spec)}, {_runs(grids)}"
    said = [*spec.simulation.checked.splitlines()]
    said += [note for each, grid in pairs for note in notes(each, grid)]
    draw(panels, title, path, notes=said, dpi=110)


def _runs(grids: Sequence[Grid]) -> str:
    """Write the requests of a run, and the seeds that systems had."""
    every = [one for grid in grids for found in grid.values() for one in found]
    lengths = [one.num_requests for one in every]
    more = f" to {max(lengths)}" if max(lengths) > min(lengths) else ""
    seeds = " or ".join(map(str, sorted({len(one.per_seed_rps) for one in every})))
    return f"N={min(lengths)}{more}, {seeds} seeds"


def _bars(each: Map, found: Sequence[SystemResult]) -> Bars:
    """Return a bar for each system, with its interval."""
    bars: list[Bar] = []
    colours = system_colours(one.system for one in found)
    for one in found:
        low, high = one.goodput.low, one.goodput.high
        known = None if low is None or high is None else (low, high)
        spans = [(0.0, one.goodput.mean, colours[one.system])]
        label = f"{one.system}\n{one.deployment}"
        bars.append(Bar(label=label, spans=spans, interval=known))
    seeds = "no intervals" if bars[0].interval is None else "95 % intervals over seeds"
    (cell,) = each.cells.values()
    return Bars(
        title=str(cell.slo) + _footnote(found),
        x=f"goodput (requests/s per device), {seeds}",
        bars=bars,
    )


def plot_lengths(workload: TraceWorkload, path: pathlib.Path) -> None:
    """Draw the distributions of a trace's prompts and outputs."""
    shares = np.linspace(0, 100, 101)

    def curve(tokens: Sequence[int]) -> list[XY]:
        lengths = np.percentile(tokens, shares)
        return list(zip(lengths.tolist(), shares.tolist(), strict=True))

    lengths = {
        "prompts": curve([row.prompt_tokens for row in workload.rows]),
        "outputs": curve([row.output_tokens for row in workload.rows]),
    }
    panel = Panel(
        title=f"{len(workload.rows)} requests",
        x="length (tokens)",
        y="requests that are no longer (%)",
        series=curves(lengths),
        log_x=True,
    )
    draw([panel], "Lengths of the trace", path)


def _cell_map(spec: ComparisonSpec, each: Map, grid: Grid) -> CellMap:
    colours = system_colours(spec.systems)
    kinds = f": {DISAGGREGATED} or colocated" if spec.two_kinds else ""
    return CellMap(
        title=each.fixed + _footnote(*grid.values()),
        x=f"{each.x.name} ({each.x.unit})",
        y=f"{each.y.name} ({each.y.unit})",
        columns=[f"{value:g}" for value in each.x.values],
        rows=[f"{value:g}" for value in each.y.values],
        cells={at: _map_cell(judge(found), colours) for at, found in grid.items()},
        legend={name: colours[name] for name in spec.systems},
        hatched=f"{UNCLEAR}{kinds}",
        notes=(
            "~ not clearly over the runner-up",
            "/s: goodput per device",
            *(("d/c: disaggregated / best colocated",) if spec.two_kinds else ()),
        ),
    )


def _map_cell(judged: CellVerdict, colours: Mapping[str, int]) -> ColouredCell:
    infeasible = judged.verdict == INFEASIBLE
    colour = None if infeasible else colours[judged.winner.system]
    return ColouredCell(
        text=_label(judged), colour=colour, hatched=judged.verdict == UNCLEAR
    )


def _footnote(*cells: Sequence[SystemResult]) -> str:
    """Say what the mark of bounded runs means, where there are any."""
    if not any(found[0].bounded for found in cells):
        return ""
    return f"\n{_BOUNDED} runs are shorter than the targets ask for"


def _label(judged: CellVerdict) -> str:
    """Name the winner, its goodput, and the ratio of the pair that is compared."""
    if judged.verdict == INFEASIBLE:
        nearest = min(found.needs for found in judged.ranked)
        why = f"alone: {nearest:.2g} x\nthe targets" if nearest > 1 else "under load"
        return f"{INFEASIBLE}\n{why}"
    about = "" if judged.over_runner_up.clear else "~ "
    name, goodput = judged.winner.system, judged.winner.rps
    mark = f" {_BOUNDED}" if judged.winner.bounded else ""
    head = f"{about}{name}\n{goodput:.3g}/s{mark}\n"
    ratio = judged.over.ratio
    if ratio is None:
        return f"{head}only {'kind' if judged.two_kinds else 'one'} that serves"
    pair = "d/c" if judged.two_kinds else f"over {judged.pair[1].system}"
    return f"{head}{pair} {interval_text(ratio)}".replace(" [", "\n[")
