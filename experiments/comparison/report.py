"""What a comparison of systems shows: tables, a picture, a sentence for each map."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.patches import Patch, Rectangle

from disagg_jax.metrics import Interval
from disagg_jax.workload import TraceWorkload
from experiments.comparison.comparison import (
    COLOCATED,
    DISAGGREGATED,
    INFEASIBLE,
    POLICIES,
    UNCLEAR,
    Found,
    Judged,
    Map,
    Margin,
    Question,
    cell_notes,
    judge,
    needed,
    sentence,
    shown_slo,
)
from experiments.papers.figure import Panel, Series, shown_interval
from experiments.placement.placements import lines
from experiments.report.draw import COLOURS, draw
from experiments.report.table import align
from experiments.runs.folder import plain

Grid = Mapping[tuple[int, int], Sequence[Found]]
_COLOUR_OF = dict(zip(POLICIES, COLOURS, strict=False))
_BOUNDED = "\u2020"  # a dagger: marks goodputs of runs that are too short
_WHITE_ON = ("#0072B2", "#009E73", "#000000")  # colours too dark for black letters

# ---- text ----------------------------------------------------------------------------


def text(question: Question, maps: Sequence[Map], grids: Sequence[Grid]) -> str:
    """All tables, then the sentences."""
    parts = [_header(question)]
    for each, grid in zip(maps, grids, strict=True):
        parts += [_table(each, grid), _goodputs(each, grid)]
    for each, grid in zip(maps, grids, strict=True):
        parts.append(_details(question, each, grid))
    parts += sentences(maps, grids)
    return "\n\n".join(parts)


def sentences(maps: Sequence[Map], grids: Sequence[Grid]) -> list[str]:
    """When not to disaggregate, for each map; of a single cell, its answer."""
    return [
        sentence(each, {at: judge(found).verdict for at, found in grid.items()})
        + bounded(grid)
        if len(grid) > 1
        else answer(*grid.values()) + bounded(grid)
        for each, grid in zip(maps, grids, strict=True)
    ]


def bounded(grid: Grid) -> str:
    """In how many cells runs are shorter than they should be; '' for none."""
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


def _header(question: Question) -> str:
    simulation = question.simulation
    link = simulation.inside or "a free link"
    limits = ", ".join(
        f"{name} {policy.limits.decode_rows}"
        for name in question.systems
        for policy in POLICIES[name].values()
        if policy.limits.decode_rows
    )
    return "\n".join(
        [
            f"{simulation.model_name} on {question.devices} devices, "
            f"{simulation.cost}, KV over {link}; simulated",
            f"goodput: requests/s per device at which {question.plan.target:.0%} of "
            "the requests meet both targets",
            f"seeds {', '.join(map(str, question.seeds))}; N requests a run; 95 % "
            "intervals over seeds; ratios are paired by seed",
            f"requests that decode at once, at most: {limits}; fewer if a step is "
            "smaller",
            "the best of several candidates is a little too good, as they are compared "
            "on the runs by which they were chosen",
        ]
    )


def _table(each: Map, grid: Grid) -> str:
    """A row for each cell."""
    head = (
        f"{each.x.name}, {each.x.unit}",
        f"{each.y.name}, {each.y.unit}",
        "N",
        "winner",
        "goodput",
        "over the runner-up",
        "disaggregated / best colocated",
        "verdict",
    )
    rows = [
        (f"{each.x.values[i]:g}", f"{each.y.values[j]:g}", *_row(judge(found)))
        for (i, j), found in grid.items()
    ]
    title = f"map of {each.name}: {each.fixed}"
    return "\n".join([title, *notes(each, grid), *align([head, *rows])])


def notes(each: Map, grid: Grid) -> list[str]:
    """Where a map's requests come from, and why it has no intervals, if it has none."""
    said: dict[str, None] = {}
    for cell in each.cells.values():
        if isinstance(cell.workload, TraceWorkload):
            said |= dict.fromkeys(cell.workload.notes)
    why = {one.why_dependent: None for found in grid.values() for one in found}
    return [*said, *(f"no interval: {reason}" for reason in why if reason)]


def _row(judged: Judged) -> tuple[str, ...]:
    winner = judged.winner
    if judged.verdict == INFEASIBLE:
        why = f"{INFEASIBLE}: {judged.why_infeasible}"
        return (needed(winner), "-", "-", "-", "-", why)
    return (
        needed(winner),
        winner.system,
        shown_interval(winner.goodput, ".3g"),
        f"{_shown(judged.over_runner_up)} {judged.ranked[1].system}",
        f"{_shown(judged.over_colocated)} {judged.best_colocated.system}",
        judged.verdict,
    )


def _shown(margin: Margin) -> str:
    if margin.ratio is None:
        return "only one serves:" if margin.clear else "some seeds have none:"
    unclear = "" if margin.clear else " (unclear)"
    return f"{shown_interval(margin.ratio)}{unclear}"


def _goodputs(each: Map, grid: Grid) -> str:
    """Mean goodput of every system in every cell."""
    systems = [found.system for found in next(iter(grid.values()))]
    head = (each.x.name, each.y.name, *systems)
    rows = [
        (
            f"{each.x.values[i]:g}",
            f"{each.y.values[j]:g}",
            *(f"{one.rps:.3g}" for one in found),
        )
        for (i, j), found in grid.items()
    ]
    title = "goodput, requests/s per device"
    return "\n".join([title, *align([head, *rows])])


def _details(question: Question, each: Map, grid: Grid) -> str:
    """Which deployment and which parameters each system had, and why."""
    out = [f"parameters, map of {each.name}"]
    for (i, j), found in grid.items():
        x, y = each.x, each.y
        out.append(f"{x.name} {x.values[i]:g}, {y.name} {y.values[j]:g} {y.unit}")
        for one in found:
            reasons = "; ".join(one.parameters)
            got = f"{one.deployment}: {_figure(one)}; {reasons}"
            out.append(f"  {one.system:<14} {got}")
            if question.budgets:
                out += [f"    {line}" for line in lines(one.candidates)]
    return "\n".join(out)


def _figure(found: Found) -> str:
    """The goodput, and what makes it doubtful."""
    if found.rps == 0:
        return f"no goodput, alone it needs {found.needs:.3g} x the targets"
    best = found.candidates[0]
    doubts = [f"not {m}" for m in ("steady", "bracketed", "resolved") if not best[m]]
    doubts += [found.inversion] if found.inversion else []
    return ", ".join([f"{found.rps:.3g}/s", *doubts])


def answer(found: Sequence[Found]) -> str:
    """Who wins one cell, by how much, and how sure that is."""
    judged = judge(found)
    if judged.verdict == INFEASIBLE:
        return f"Nobody: {judged.why_infeasible}."
    winner, best = judged.winner, judged.best_colocated
    head = (
        f"{winner.system} ({winner.deployment}) serves the most: "
        f"{shown_interval(winner.goodput, '.3g')} requests/s per device."
    )
    over = f"Disaggregated over {best.system}, the best colocated system"
    said = {
        DISAGGREGATED: "disaggregate",
        COLOCATED: "do not disaggregate",
        UNCLEAR: "no clear winner",
    }[judged.verdict]
    ratio = judged.over_colocated.ratio
    how_much = shown_interval(ratio) if ratio else "not both meet the targets"
    why = f" No interval: {winner.why_dependent}." if winner.why_dependent else ""
    rises = [f"\n{f.system}: {f.inversion}." for f in found if f.inversion]
    return f"{head}\n{over}: {how_much}: {said}.{why}{''.join(rises)}"


# ---- JSON ----------------------------------------------------------------------------


def record(question: Question, maps: Sequence[Map], grids: Sequence[Grid]) -> Any:
    """All that was asked and found, ready for JSON."""
    return {
        "question": {
            "simulation": plain(question.simulation),
            "devices": question.devices,
            "systems": question.systems,
            "sizes": question.sizes,
            "budgets": question.budgets,
            "plan": plain(question.plan),
            "num_requests": question.num_requests,
            "max_requests": question.max_requests,
            "seeds": question.seeds,
            "policies": {name: plain(POLICIES[name]) for name in question.systems},
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


def _cell(each: Map, at: tuple[int, int], judged: Judged) -> dict[str, Any]:
    return {
        each.x.name: each.x.values[at[0]],
        each.y.name: each.y.values[at[1]],
        "cell": plain(each.cells[at]),
        "verdict": judged.verdict,
        "winner": judged.winner.system if judged.winner.rps else None,
        "why_infeasible": judged.why_infeasible
        if judged.verdict == INFEASIBLE
        else None,
        "over_runner_up": plain(judged.over_runner_up),
        "best_colocated": judged.best_colocated.system,
        "over_colocated": plain(judged.over_colocated),
        "num_requests": judged.winner.num_requests,
        "bounded": judged.winner.bounded,
        "notes": cell_notes(judged.ranked),
        "systems": [
            {**plain(one), "goodput": plain(one.goodput)} for one in judged.ranked
        ],
    }


# ---- picture -------------------------------------------------------------------------


def plot(
    question: Question,
    maps: Sequence[Map],
    grids: Sequence[Grid],
    path: pathlib.Path,
) -> None:
    """A map of winners for each pair of axes; of a single cell, all goodputs."""
    if len(maps) == 1 and len(maps[0].cells) == 1:
        ((found,),) = (grid.values() for grid in grids)
        _plot_cell(question, maps[0], found, path)
        return
    with matplotlib.rc_context({"font.size": 9, "hatch.linewidth": 0.6}):
        wide = sum(1.75 * len(each.x.values) + 1.2 for each in maps)
        high = 1.1 * max(len(each.y.values) for each in maps) + 2.2
        figure = matplotlib.figure.Figure(
            figsize=(max(wide, 9.0), high), layout="constrained"
        )
        axes = figure.subplots(1, len(maps), squeeze=False)[0]
        for one, each, grid in zip(axes, maps, grids, strict=True):
            _draw(one, each, grid)
        figure.legend(
            handles=_legend(question), loc="outside lower center", ncols=4, fontsize=8
        )
        simulation = question.simulation
        figure.suptitle(
            f"Who serves the most: {simulation.model_name} on {question.devices} "
            f"devices, {simulation.cost}, {len(question.seeds)} seeds",
            fontsize=10,
        )
        _caption(figure, maps, grids)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _caption(figure: Any, maps: Sequence[Map], grids: Sequence[Grid]) -> None:
    """What is to be said of a trace, below everything."""
    said = [notes(each, grid) for each, grid in zip(maps, grids, strict=True)]
    lines = [textwrap.fill(line, 120) for part in said for line in part]
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=7)


def _plot_cell(
    question: Question, each: Map, found: Sequence[Found], path: pathlib.Path
) -> None:
    """A bar for each system with its interval."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = matplotlib.figure.Figure(
            figsize=(8, 1.6 + 0.4 * len(found)), layout="constrained"
        )
        axes = figure.subplots()
        for i, one in enumerate(found):
            goodput = one.goodput
            axes.barh(i, goodput.mean, color=_COLOUR_OF[one.system], height=0.7)
            if goodput.low is not None and goodput.high is not None:
                ends = [goodput.low, goodput.high]
                axes.plot(ends, [i, i], "|-", color="black", lw=1, ms=8)
        axes.set_yticks(
            range(len(found)), [f"{one.system}\n{one.deployment}" for one in found]
        )
        axes.invert_yaxis()
        known = found[0].goodput.low is not None
        seeds = "95 % intervals over seeds" if known else "no intervals"
        axes.set(xlabel=f"goodput (requests/s per device), {seeds}")
        _caption(figure, [each], [{(0, 0): found}])
        simulation, (cell,) = question.simulation, each.cells.values()
        axes.set_title(
            f"{simulation.model_name} on {question.devices} devices, "
            f"{simulation.cost}; {each.fixed}\n{shown_slo(cell.slo)}{_footnote(found)}",
            fontsize=9,
        )
        figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_lengths(workload: TraceWorkload, path: pathlib.Path) -> None:
    """The distributions of a trace's prompts and outputs."""
    shares = np.linspace(0, 100, 101)

    def curve(label: str, colour: int, tokens: Sequence[int]) -> Series:
        values = np.percentile(tokens, shares).tolist()
        points = list(zip(values, shares.tolist(), strict=True))
        return Series(label=label, points=points, colour=colour)

    panel = Panel(
        title=f"{len(workload.rows)} requests",
        x="length (tokens)",
        y="requests that are no longer (%)",
        series=[
            curve("prompts", 0, [row.prompt_tokens for row in workload.rows]),
            curve("outputs", 1, [row.output_tokens for row in workload.rows]),
        ],
        log_x=True,
    )
    draw([panel], "Lengths of the trace", path)


def _draw(axes: Any, each: Map, grid: Grid) -> None:
    for at, found in grid.items():
        _draw_cell(axes, at, judge(found))
    for axis, set_ticks, set_label in (
        (each.x, axes.set_xticks, axes.set_xlabel),
        (each.y, axes.set_yticks, axes.set_ylabel),
    ):
        set_ticks(range(len(axis.values)), [f"{value:g}" for value in axis.values])
        set_label(f"{axis.name} ({axis.unit})")
    axes.set(
        xlim=(-0.5, len(each.x.values) - 0.5), ylim=(-0.5, len(each.y.values) - 0.5)
    )
    axes.tick_params(length=0)
    axes.set_title(each.fixed + _footnote(*grid.values()), fontsize=8.5)


def _footnote(*cells: Sequence[Found]) -> str:
    """What the mark of bounded runs means, where there are any."""
    if not any(found[0].bounded for found in cells):
        return ""
    return f"\n{_BOUNDED} runs are shorter than the targets ask for"


def _draw_cell(axes: Any, at: tuple[int, int], judged: Judged) -> None:
    x, y = at
    infeasible = judged.verdict == INFEASIBLE
    colour = "white" if infeasible else _COLOUR_OF[judged.winner.system]
    letters = "white" if colour in _WHITE_ON else "black"
    hatch = "///" if judged.verdict == UNCLEAR else None
    axes.add_patch(
        Rectangle(
            (x - 0.5, y - 0.5),
            1,
            1,
            facecolor=colour,
            edgecolor="white" if hatch else "#444444",
            hatch=hatch,
            lw=0.8,
        )
    )
    box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
    axes.text(
        x,
        y,
        _label(judged),
        ha="center",
        va="center",
        color=letters,
        fontsize=7.5,
        bbox=box,
    )


def _label(judged: Judged) -> str:
    """The winner, its goodput, and disaggregated over the best colocated system."""
    if judged.verdict == INFEASIBLE:
        nearest = min(found.needs for found in judged.ranked)
        why = f"alone: {nearest:.2g} x\nthe targets" if nearest > 1 else "under load"
        return f"{INFEASIBLE}\n{why}"
    about = "" if judged.over_runner_up.clear else "~ "
    name, goodput = judged.winner.system, judged.winner.rps
    mark = f" {_BOUNDED}" if judged.winner.bounded else ""
    head = f"{about}{name}\n{goodput:.3g}/s{mark}\n"
    ratio = judged.over_colocated.ratio
    return head + (_ratio(ratio) if ratio else "only kind that serves")


def _ratio(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return f"d/c {ratio.mean:.2f}"
    return f"d/c {ratio.mean:.2f}\n[{ratio.low:.2f}, {ratio.high:.2f}]"


def _legend(question: Question) -> list[Patch]:
    systems = [
        Patch(facecolor=_COLOUR_OF[name], label=name) for name in question.systems
    ]
    return [
        *systems,
        Patch(
            facecolor="#DDDDDD",
            edgecolor="#444444",
            hatch="///",
            label=f"{UNCLEAR}: {DISAGGREGATED} or colocated",
        ),
        Patch(
            facecolor="none",
            edgecolor="none",
            label="~ not clearly over the runner-up",
        ),
        Patch(
            facecolor="none",
            edgecolor="none",
            label="/s: goodput per device",
        ),
        Patch(
            facecolor="none",
            edgecolor="none",
            label="d/c: disaggregated / best colocated",
        ),
    ]
