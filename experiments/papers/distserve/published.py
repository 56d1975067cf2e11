"""Reads the points of DistServe's figures; holds the SLOs of its evaluation."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.metrics import SLO
from experiments.report.panel import XY, Panel, Series, curves

POINTS = pathlib.Path(__file__).parents[2] / "profiles" / "distserve_figures.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperPanel:
    """One set of axes of a published figure."""

    x: str  # quantity and unit
    y: str
    series: Mapping[str, Sequence[XY]]

    def curves(
        self, colours: Mapping[str, int] | None = None, named: str = "{}, paper"
    ) -> list[Series]:
        """Return the points as hollow markers; without colours each has its own.

        Args:
          colours: which series to draw, in which colour.
        """
        chosen = self.series if colours is None else colours
        points = {name: self.series[name] for name in self.series if name in chosen}
        return curves(points, named, colours=colours, style="paper")

    def panel(self, title: str, series: Sequence[Series], **axes: Any) -> Panel:
        """Draw curves on axes named as the published ones; `axes` is for `Panel`."""
        return Panel(title=title, x=self.x, y=self.y, series=series, **axes)

    def attainment(self, title: str, series: Sequence[Series]) -> Panel:
        """Draw attainments in %, with a line at the target."""
        return self.panel(title, series, line=100 * TARGET, ylim=(-3, 103))


@functools.cache
def _figures() -> Mapping[str, Any]:
    return json.loads(POINTS.read_text())["figures"]


def paper_panel(figure: str, panel: str) -> PaperPanel:
    """Return the digitised points of a panel."""
    data = _figures()[figure]["panels"][panel]
    series = {
        name: [(float(x), float(y)) for x, y in points]
        for name, points in data["series"].items()
    }
    return PaperPanel(x=data["x"], y=data["y"], series=series)


def paper_crossings(figure: str, panel: str) -> Mapping[str, float]:
    """Return where each system crosses 90 %, by the figure's vertical lines."""
    return _figures()[figure]["crossings_at_90"][panel]


# Table 1 of arXiv v3.
SLOS: Mapping[str, SLO] = {
    "chat 13B": SLO(ttft_s=0.25, tpot_s=0.1),
    "chat 66B": SLO(ttft_s=2.5, tpot_s=0.15),
    "chat 175B": SLO(ttft_s=4.0, tpot_s=0.2),
    "code 66B": SLO(ttft_s=0.125, tpot_s=0.2),
    "summary 66B": SLO(ttft_s=15.0, tpot_s=0.15),
    # Of arXiv v1, and of the artifact's scripts for Figs. 8b and 11.
    "chat 66B, artifact": SLO(ttft_s=0.4, tpot_s=0.1),
    # The motivation's and the blog's: 512 prompt and 64 output tokens.
    "toy": SLO(ttft_s=0.4, tpot_s=0.04),
}

TARGET = 0.9  # joint attainment that counts as served
