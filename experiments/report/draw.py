"""Draws panels into PNGs; the only module that knows matplotlib."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from experiments.report.colours import COLOURS, DARK
from experiments.report.panel import Bars, CellMap, Panel, Series

_PALETTE = 256  # colours of a file: all that is drawn, at half the bytes
_MARKERS = "osD^vP*X"
_STYLE: Any = {
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
}
_LINES: dict[str, dict[str, Any]] = {  # by the style of a series
    "line": {"ls": "-", "lw": 1.4},
    "dots": {"ls": "-", "lw": 1.4, "marker": "o", "ms": 3.5},
    "dashed": {"ls": "--", "lw": 1.4},
    "dotted": {"ls": ":", "lw": 0.9},
    "diamond": {"ls": "", "marker": "D", "ms": 7},
    "cloud": {"ls": "", "marker": ".", "ms": 4},
    "paper": {"ls": ":", "lw": 0.7, "ms": 4.5, "mfc": "none"},
}


def draw(
    panels: Sequence[Panel | Bars | CellMap],
    title: str,
    path: pathlib.Path,
    *,
    notes: Sequence[str] = (),
    dpi: int = 88,
) -> None:
    """Write a PNG with panels side by side; equal panels give equal bytes.

    Args:
      notes: lines below the title.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(panels, title, notes)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(dpi)
        canvas.draw()
        picture = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        # Coverage, as a median cut merges the colours of thin lines.
        indexed = picture.quantize(_PALETTE, PIL.Image.Quantize.MAXCOVERAGE)
        indexed.save(path, optimize=True)


def _figure(
    panels: Sequence[Panel | Bars | CellMap], title: str, notes: Sequence[str]
) -> matplotlib.figure.Figure:
    widths, heights = zip(*map(_inches, panels), strict=True)
    maps = any(isinstance(panel, CellMap) for panel in panels)
    # A lone panel's title needs more than the panel, and a map's legend still more.
    width = max(sum(widths), 9.0 if maps else 5.75)
    figure = matplotlib.figure.Figure((width, max(heights)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    handles: dict[str, Any] = {}
    for one, panel in zip(axes, panels, strict=True):
        if isinstance(panel, Panel):
            _curves(one, panel)
        elif isinstance(panel, Bars):
            handles |= _bars(one, panel)
        else:
            handles |= _cells(one, panel)
        one.set_xlabel(panel.x)
        one.set_title(panel.title, fontsize=8)
    if handles:
        figure.legend(
            handles=list(handles.values()),
            loc="outside lower center",
            ncols=4 if maps else len(handles),
        )
    lines = [textwrap.fill(note, int(14 * width)) for note in notes]
    figure.suptitle("\n".join([title, *lines]), fontsize=9)
    return figure


def _inches(panel: Panel | Bars | CellMap) -> tuple[float, float]:
    """Return the width and the height of a panel."""
    if isinstance(panel, Panel):
        return 4.6, 4.4
    if isinstance(panel, Bars):
        return 7.0, 1.6 + 0.5 * len(panel.bars)
    return 1.75 * len(panel.columns) + 1.2, 1.1 * len(panel.rows) + 2.4


def _curves(axes: Any, panel: Panel) -> None:
    for series in panel.series:
        _series(axes, series)
    if panel.line is not None:
        axes.axhline(panel.line, color="black", lw=0.8)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.x_ticks:
        axes.set_xticks(panel.x_ticks, [f"{x:g}" for x in panel.x_ticks], minor=False)
        axes.set_xticks([], minor=True)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.ylim is not None:
        axes.set_ylim(*panel.ylim)
    axes.set_ylabel(panel.y)
    columns = 2 if len(panel.series) > 4 else 1
    # Below the axes, where it hides no point.
    axes.legend(
        fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns
    )


def _series(axes: Any, series: Series) -> None:
    colour, style = COLOURS[series.colour % len(COLOURS)], _LINES[series.style]
    x, y = zip(*series.points, strict=True) if series.points else ((), ())
    if series.style == "paper":
        style = {**style, "marker": _MARKERS[series.colour % len(_MARKERS)]}
    elif len(x) == 1 and series.label:
        style = {"marker": ".", **style}  # a line through one point shows nothing
    axes.plot(x, y, color=colour, label=series.label, **style)
    if series.band:
        low, high = zip(*series.band, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _bars(axes: Any, panel: Bars) -> dict[str, Any]:
    """Draw bars; return what the legend shows, by label."""
    for i, bar in enumerate(panel.bars):
        for start, end, colour in bar.spans:
            axes.barh(i, end - start, left=start, color=COLOURS[colour], height=0.7)
        if bar.interval is not None:
            axes.plot(bar.interval, [i, i], "|-", color="black", lw=1, ms=8)
        if bar.ticks:
            axes.plot(bar.ticks, [i] * len(bar.ticks), "|", color="black", ms=7)
    axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    handles = _patches(panel.legend)
    if panel.ticks:
        handles[panel.ticks] = Line2D(
            [], [], marker="|", ls="", color="black", label=panel.ticks
        )
    return handles


def _cells(axes: Any, panel: CellMap) -> dict[str, Any]:
    """Draw cells; return what the legend shows, by label."""
    for (x, y), cell in panel.cells.items():
        colour = "white" if cell.colour is None else COLOURS[cell.colour]
        edge = "white" if cell.hatched else "#444444"
        hatch = "///" if cell.hatched else None
        corner = (x - 0.5, y - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fc=colour, ec=edge, hatch=hatch, lw=0.8))
        axes.text(
            *(x, y, cell.text),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if cell.colour in DARK else "black",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )
    axes.set_xticks(range(len(panel.columns)), panel.columns)
    axes.set_yticks(range(len(panel.rows)), panel.rows)
    axes.set(
        xlim=(-0.5, len(panel.columns) - 0.5),
        ylim=(-0.5, len(panel.rows) - 0.5),
        ylabel=panel.y,
    )
    axes.tick_params(length=0)
    axes.grid(visible=False)
    hatched = Patch(fc="#DDDDDD", ec="#444444", hatch="///", label=panel.hatched)
    notes = {note: Patch(fc="none", ec="none", label=note) for note in panel.notes}
    return {**_patches(panel.legend), panel.hatched: hatched, **notes}


def _patches(legend: Mapping[str, int]) -> dict[str, Any]:
    return {
        label: Patch(fc=COLOURS[colour], label=label)
        for label, colour in legend.items()
    }
