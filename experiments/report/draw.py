"""Pictures of reproduced figures: our curves over the paper's points."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.papers.figure import Panel, Series

# Okabe and Ito's colours, which stay apart for the colour-blind.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
)
_DPI = 88
_PALETTE = 256  # colours of a file: all that is drawn, at half the bytes
_MARKERS = "osD^vP*X"


def draw(panels: Sequence[Panel], title: str, path: pathlib.Path) -> None:
    """Writes a PNG; equal panels give equal bytes."""
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        width = 4.6 * max(len(panels), 1.25)  # a lone panel's title needs more
        figure = matplotlib.figure.Figure(figsize=(width, 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for one, panel in zip(axes, panels, strict=True):
            _panel(one, panel)
        figure.suptitle(title, fontsize=9)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(_DPI)
        canvas.draw()
        picture = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        # Coverage, as a median cut merges the colours of thin lines.
        indexed = picture.quantize(_PALETTE, PIL.Image.Quantize.MAXCOVERAGE)
        indexed.save(path, optimize=True)


def _panel(axes: Any, panel: Panel) -> None:
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
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(panel.title, fontsize=8)
    columns = 2 if len(panel.series) > 4 else 1
    # Below the axes, where it hides no point.
    axes.legend(
        fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns
    )


def _series(axes: Any, series: Series) -> None:
    colour = COLOURS[series.colour % len(COLOURS)]
    x, y = zip(*series.points, strict=True) if series.points else ((), ())
    if series.paper:
        marker = _MARKERS[series.colour % len(_MARKERS)]
        style = {"ls": ":", "lw": 0.7, "marker": marker, "ms": 4.5, "mfc": "none"}
        axes.plot(x, y, color=colour, label=series.label, **style)
        return
    line = "--" if series.dashed else "-"
    marker = "." if len(x) == 1 else None  # a line through one point shows nothing
    axes.plot(x, y, line, color=colour, lw=1.4, marker=marker, label=series.label)
    if series.band:
        low, high = zip(*series.band, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
